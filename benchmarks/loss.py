"""The chunked divergence beside TRL's ``ChunkedDivergenceFunction`` (and Liger's, where installed), in one run.

    python -m benchmarks.loss [--tokens 512 2048 8192] [--vocab 49152 151936] [--repeat 5] [--limit 5e8] [--json OUT]

Forward and backward from bf16 hidden states and heads to the gradients of the student's hidden states and head, the
same tensors for each side, on a GPU where there is one (``--device``). Times are medians of interleaved runs, the ratio
is the median of the paired ratios, so a busy machine slows both sides alike. Peak memory is what a fresh process grows
by over its inputs, one process a side: resident memory, on a GPU what torch has allocated there.
Lines with more than ``--limit`` logits are left out, and said to be (minutes each for TRL); ``--limit inf`` runs all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from onpolicy.metrics import wait_for_gpu

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Side = Callable[[str, Inputs], Tensor]


def ours(loss: str, inputs: Inputs) -> Tensor:
    from onpolicy.losses import chunked

    return chunked(loss, *inputs)[0]


def trl(loss: str, inputs: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, head, teacher, teacher_head = inputs
    return ChunkedDivergenceFunction.apply(student, head, None, teacher, teacher_head, None, BETAS[loss])[0].mean()


def liger(loss: str, inputs: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    student, head, teacher, teacher_head = inputs
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETAS[loss], compiled=False)
    return module(student, head, teacher, teacher_head, torch.zeros(len(student), dtype=torch.long, device=head.device))


def sides() -> dict[str, Side]:
    """The implementations there are; Liger only where it can be imported."""
    present: dict[str, Side] = {"ours": ours, "trl": trl}
    if importlib.util.find_spec("liger_kernel") is not None:
        present["liger"] = liger
    return present


def make_inputs(tokens: int, vocab: int, hidden: int, device: str) -> Inputs:
    """bf16 hidden states and heads whose logits have a language model's spread (standard deviation about 3)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    head, scale = draw(vocab, hidden), 3 / hidden**0.5
    student = draw(tokens, hidden) * scale
    teacher = 0.8 * student + 0.6 * scale * draw(tokens, hidden)
    student, teacher, head = (tensor.to(device, torch.bfloat16) for tensor in (student, teacher, head))
    return student.requires_grad_(), head.clone().requires_grad_(), teacher, head


def step(side: Side, loss: str, inputs: Inputs) -> tuple[float, float]:
    """One forward and backward: seconds, and the loss."""
    inputs[0].grad = inputs[1].grad = None
    wait_for_gpu()
    start = time.perf_counter()
    value = side(loss, inputs)
    value.backward()
    wait_for_gpu()
    return time.perf_counter() - start, float(value.detach())


def peak_growth_mib(side: Side, loss: str, tokens: int, vocab: int, hidden: int, device: str) -> float:
    """MiB that one step adds to this process; a tiny step before it pays for imports and compilation."""
    step(side, loss, make_inputs(8, 128, 32, device))
    inputs = make_inputs(tokens, vocab, hidden, device)
    if inputs[0].is_cuda:
        inputs[0].grad = inputs[1].grad = None
        torch.cuda.reset_peak_memory_stats()
        given = torch.cuda.memory_allocated() / 2**20
        step(side, loss, inputs)
        return common.device_peak_mib() - given
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest resident size so far
    before = common.rss_mib()
    step(side, loss, inputs)
    return common.peak_rss_mib() - before


def measure(loss: str, tokens: int, vocab: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table: interleaved times of all sides, and their memory."""
    inputs = make_inputs(tokens, vocab, args.hidden, args.device)
    present = sides()
    for side in present.values():
        step(side, loss, make_inputs(8, 128, 32, args.device))
    times: dict[str, list[float]] = {name: [] for name in present}
    values: dict[str, float] = {}
    start = time.perf_counter()
    while len(times["ours"]) < args.repeat and (not times["ours"] or time.perf_counter() - start < args.seconds):
        for name, side in present.items():
            seconds, values[name] = step(side, loss, inputs)
            times[name].append(seconds)
    del inputs
    result: dict[str, Any] = {"loss": loss, "tokens": tokens, "vocab": vocab}
    for name in present:
        result[f"{name}_ms"] = round(1e3 * statistics.median(times[name]), 1)
        result[f"{name}_peak_mib"] = round(_peak_in_child(name, loss, tokens, vocab, args), 1)
    pairs = zip(times["trl"], times["ours"], strict=True)
    result["ratio"] = round(statistics.median(theirs / mine for theirs, mine in pairs), 2)
    result["pairs"] = len(times["ours"])
    result["relative_difference"] = abs(values["ours"] - values["trl"]) / abs(values["trl"])
    return result


def _peak_in_child(name: str, loss: str, tokens: int, vocab: int, args: argparse.Namespace) -> float:
    numbers = [str(x) for x in (tokens, vocab, args.hidden, args.threads)]
    child = ["-m", "benchmarks.loss", "--device", args.device, "--peak-of", name, loss, *numbers]
    return float(common.in_subprocess(child)["peak_mib"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", nargs="+", choices=tuple(BETAS), default=["reverse_kl", "jsd"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--vocab", nargs="+", type=int, default=[49152, 151936])
    parser.add_argument(
        "--hidden", type=int, default=576, help="hidden size of student and teacher (SmolLM2-135M: 576)"
    )
    parser.add_argument("--repeat", type=int, default=5, help="pairs of runs a line, at most")
    parser.add_argument("--seconds", type=float, default=5, help="start no further pair of a line after this long")
    parser.add_argument("--limit", type=float, default=5e8, help="leave out lines with more logits (tokens x vocab)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="OUT", help="also write the result there, with commit, versions and machine")
    parser.add_argument("--peak-of", nargs=6, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Print the table, then one JSON object as the last line."""
    args = _parser().parse_args()
    if args.peak_of:
        name, loss, *numbers = args.peak_of
        tokens, vocab, hidden, threads = map(int, numbers)
        torch.set_num_threads(threads)
        print(json.dumps({"peak_mib": peak_growth_mib(sides()[name], loss, tokens, vocab, hidden, args.device)}))
        return
    torch.set_num_threads(args.threads)
    names = list(sides())
    print(
        f"{'loss':<12}{'tokens':>8}{'vocab':>9}"
        + "".join(f"{n + ' ms':>12}{n + ' MiB':>12}" for n in names)
        + "  TRL/ours"
    )
    results = []
    for vocab in args.vocab:
        for loss in args.loss:
            for tokens in args.tokens:
                if tokens * vocab > args.limit:
                    print(f"{loss:<12}{tokens:>8,}{vocab:>9,}  left out: more than {args.limit:g} logits, see --limit")
                    continue
                line = measure(loss, tokens, vocab, args)
                cells = "".join(f"{line[n + '_ms']:>12,.1f}{line[n + '_peak_mib']:>12,.0f}" for n in names)
                print(f"{loss:<12}{tokens:>8,}{vocab:>9,}{cells}{line['ratio']:>9.2f}x", flush=True)
                results.append(line)
    common.finish({"results": results}, args.json)


if __name__ == "__main__":
    main()
