"""Logits of a chunk of tokens on a CPU: ours, torch's in float32, and torch's that are rounded to bf16.

Milliseconds of [n, D] @ [D, V] with bf16 operands (``--head float32``: the head is a trained float32 one). The third
side computes something coarser: it is what the CPU can do, not an alternative. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import common
from onpolicy import bf16_products
from onpolicy.losses._projection import bf16_arithmetic


def sides(tokens: int, vocab: int, size: int, head_dtype: torch.dtype) -> Mapping[str, Callable[[], object]]:
    """Name -> one call."""
    hidden, head = torch.randn(tokens, size).bfloat16(), torch.randn(vocab, size).to(head_dtype)
    logits, coarse = torch.empty(tokens, vocab), torch.empty(tokens, vocab).bfloat16()
    wide_hidden, wide_head, head16 = hidden.float(), head.float(), head.bfloat16()

    def float32() -> None:
        with bf16_arithmetic(torch.bfloat16):
            torch.mm(wide_hidden, wide_head.t(), out=logits)

    return {
        "ours": lambda: bf16_products.logits(hidden, head, logits),
        "float32": float32,
        "bf16": lambda: torch.mm(hidden, head16.t(), out=coarse),
    }


def main() -> None:
    """Print the table, then one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 273, 512])
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--size", type=int, default=576, help="hidden size")
    parser.add_argument("--head", choices=("bfloat16", "float32"), default="bfloat16")
    common.add_timing_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for tokens in args.tokens:
        gflop = 2e-9 * tokens * args.vocab * args.size
        calls = sides(tokens, args.vocab, args.size, getattr(torch, args.head))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.repeat + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
        line = "".join(f"  {name} {1e3 * s:7.1f} ms {gflop / s:5.0f} GFLOP/s" for name, s in medians.items())
        print(f"{tokens:>6} tokens{line}", flush=True)
        results.append({"tokens": tokens, **{f"{name}_ms": round(1e3 * s, 2) for name, s in medians.items()}})
    common.finish({"results": results}, args.json)


if __name__ == "__main__":
    main()
