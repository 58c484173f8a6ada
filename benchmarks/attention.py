"""Causal attention of training, beside torch's fused CPU kernel, in one run.

Milliseconds of the forward and of the backward pass over bf16 sequences as the default models have them. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import common
from onpolicy.layers.causal_attention import causal_attention

HEADS, SHARED, SIZE = 9, 3, 64  # SmolLM2-135M: query heads, key heads, head size


def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """torch's kernel, on the same layout."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return output.transpose(1, 2)


def measure(sequences: int, positions: int, repeat: int) -> dict[str, float]:
    """Medians, the two sides in turn."""
    inputs = [
        torch.randn(sequences, positions, heads, SIZE).bfloat16().requires_grad_() for heads in (HEADS, SHARED, SHARED)
    ]
    grad = torch.randn(sequences, positions, HEADS, SIZE).bfloat16()
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = call()
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in range(repeat + 1):
        for name, attend in (("ours", causal_attention), ("torch", fused)):
            output = timed(f"{name}_forward_ms", lambda attend=attend: attend(*inputs, SIZE**-0.5))  # type: ignore[misc]
            timed(f"{name}_backward_ms", lambda output=output: torch.autograd.grad(output, inputs, grad))  # type: ignore[misc]
    return {name: round(1e3 * statistics.median(times[1:]), 2) for name, times in seconds.items()}


def main() -> None:
    """Print the table, then one JSON object as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["32x96", "32x156", "16x512", "4x1024"], metavar="SxM")
    common.add_timing_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    print(f"{'sequences x positions':>22}{'ours fwd':>10}{'bwd':>8}{'torch fwd':>11}{'bwd':>8}  ms")
    for shape in args.shapes:
        sequences, positions = map(int, shape.split("x"))
        line = measure(sequences, positions, args.repeat)
        print(
            f"{shape:>22}"
            + "".join(f"{value:>{width}.1f}" for value, width in zip(line.values(), (10, 8, 11, 8), strict=True))
        )
        results.append({"sequences": sequences, "positions": positions, **line})
    common.finish({"results": results}, args.json)


if __name__ == "__main__":
    main()
