"""One on-policy training step, ours beside TRL's ``DistillationTrainer``: same models, prompts, rollouts and length.

Each side runs alone in a fresh process, in turn and several times, since the machine's speed drifts: the ratio is
taken pair by pair. Both train every weight of the student (embeddings too) by reverse KL on 32 fresh rollouts of
exactly 96 tokens. TRL is measured as installed, and once more with the CPU tuning our program arranges for itself
(preloaded OpenMP, threads, memory kept by the allocator): ``trl`` and ``trl_tuned``. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import trl_peer
from benchmarks.common import device_peak_mib, finish, in_subprocess, peak_rss_mib, tuned_cpu_env
from onpolicy.config import BatchingConfig


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=32, help="completions a step")
    parser.add_argument("--samples-per-prompt", type=int, default=4, help="of these, how many share a prompt")
    parser.add_argument("--completion-length", type=int, default=96, help="tokens of every completion")
    parser.add_argument("--layers", type=int, default=4, help="of the student, pruned from the default teacher")
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one of warm-up")
    parser.add_argument("--repeat", type=int, default=3, help="pairs of runs")
    parser.add_argument(
        "--token-budget", type=int, default=BatchingConfig.token_budget, help="positions a pass, of ours"
    )
    parser.add_argument("--micro-batch", type=int, default=8, help="rollouts a pass, of TRL")
    parser.add_argument("--json", metavar="OUT", help="write the result here too")
    parser.add_argument("--ours", metavar="DIR", help=argparse.SUPPRESS)  # the measured process of our side
    return parser.parse_args()


def make_student(directory: Path, layers: int) -> None:
    """The pruned student both sides start from, in ``directory``."""
    import torch

    from onpolicy.models import load_causal_lm, load_tokenizer
    from onpolicy.student import Student, evenly_spaced, prune_layers
    from onpolicy.teachers.convert import DEFAULT_TEACHER

    teacher = load_causal_lm(DEFAULT_TEACHER, torch.float32)
    student = prune_layers(teacher, evenly_spaced(layers, teacher.config.num_hidden_layers))
    Student(student).save(directory, load_tokenizer(DEFAULT_TEACHER))


def write_prompts(path: Path, count: int, repeat: int) -> None:
    """``count`` built-in word problems as conversations, each ``repeat`` times in a row."""
    from itertools import islice

    from onpolicy.prompts import word_problems

    questions = [problem.question for problem in islice(word_problems(0), count)]
    rows = [json.dumps({"messages": [{"role": "user", "content": question}]}) for question in questions]
    path.write_text("".join((row + "\n") * repeat for row in rows))


def measure_ours(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Our steps in this process: seconds of each phase, medians over the measured steps."""
    from onpolicy.prepare import prepare
    from onpolicy.run import Run
    from onpolicy.train import parse

    prompts_per_step = args.rollouts // args.samples_per_prompt
    config, _ = parse(
        [
            "--name=ours", f"--output_dir={directory}", f"--student.model={directory / 'student'}",
            f"--prompts.source={directory / 'ours.jsonl'}", "--prompts.heldout_size=0", "--evaluation.num_prompts=0",
            f"--sampling.max_tokens={args.completion_length}", f"--prompts_per_step={prompts_per_step}",
            f"--sampling.samples_per_prompt={args.samples_per_prompt}", f"--steps={args.steps + 1}",
            "--logging.trackers=[]", f"--batching.token_budget={args.token_budget}",
            "--logging.progress=false", "--optim.warmup_steps=0", "--prompts.shuffle=false",
        ]
    )  # fmt: skip
    prepared = replace(prepare(config, resume=False), stop_token_ids=())  # every completion has the full length
    records = []
    with Run(prepared) as run:
        run.build()
        (stage,) = run.stages()
        stage.begin(0)
        for _ in range(args.steps + 1):
            start = time.perf_counter()
            record = run.trainer.step(stage)
            records.append(record | {"wall": time.perf_counter() - start})
    measured = records[1:]
    expected = args.rollouts * args.completion_length
    assert all(record["completion_tokens"] == expected for record in records)
    return {
        "step_s": statistics.median(r["wall"] for r in measured),
        "phases_s": {k: statistics.median(r["seconds"][k] for r in measured) for k in measured[0]["seconds"]},
        "parity": [r["sync/logprob_abs_diff"] for r in records],
        "losses": [r["loss"] for r in records],
        "peak_rss_mib": peak_rss_mib(),
        "peak_device_mib": device_peak_mib(),
    }


def main() -> None:
    args = arguments()
    if args.ours:
        print(json.dumps(measure_ours(Path(args.ours), args)))
        return
    tokens = args.rollouts * args.completion_length
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": [], "trl_tuned": []}
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make_student(directory / "student", args.layers)
        prompts = args.rollouts // args.samples_per_prompt * (args.steps + 1)
        write_prompts(directory / "ours.jsonl", prompts, 1)
        write_prompts(directory / "trl.jsonl", prompts, args.samples_per_prompt)
        from onpolicy.teachers.convert import default_teacher

        numbers = ("rollouts", "samples_per_prompt", "completion_length", "layers", "steps", "token_budget")
        passed = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in numbers]
        peer = [
            "-W", "ignore", "-m", "benchmarks.trl_peer", "--student", str(directory / "student"),
            "--teacher", str(default_teacher()), "--prompts", str(directory / "trl.jsonl"),
            "--rollouts", str(args.rollouts), "--completion-length", str(args.completion_length),
            "--steps", str(args.steps), "--micro-batch", str(args.micro_batch),
        ]  # fmt: skip
        for repeat in range(args.repeat):
            ours = in_subprocess(["-m", "benchmarks.train_step", *passed, "--ours", scratch], env=environment())
            shutil.rmtree(directory / "ours")
            runs["ours"].append(ours)
            runs["trl"].append(in_subprocess(peer))
            runs["trl_tuned"].append(in_subprocess(peer, env=trl_peer.environment()))
            seconds = ", ".join(f"{side} {side_runs[-1]['step_s']:.2f} s" for side, side_runs in runs.items())
            print(f"round {repeat + 1}: {seconds} a step", flush=True)
    report(args, tokens, runs)


def environment() -> dict[str, str]:
    """Ours arranges its own tuning at start; as a module inside the benchmark it gets the same here."""
    return {**os.environ, **tuned_cpu_env()}


def report(args: argparse.Namespace, tokens: int, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Table, then the JSON line."""
    median = statistics.median
    result: dict[str, Any] = {"settings": {k: v for k, v in vars(args).items() if k not in ("json", "ours")}}
    names = list(dict.fromkeys(name for side in runs.values() for name in side[0]["phases_s"]))
    print(f"{'':10}{'tok/s':>8}{'step s':>8}{'peak MiB':>10}{'ratio':>7}" + "".join(f"{name:>9}" for name in names))
    for side, measured in runs.items():
        step = median(run["step_s"] for run in measured)
        phases = {k: median(run["phases_s"][k] for run in measured) for k in measured[0]["phases_s"]}
        ratio = median(peer["step_s"] / ours["step_s"] for ours, peer in zip(runs["ours"], measured, strict=True))
        peak, gpu_peak = (median(run[f"peak_{of}_mib"] for run in measured) for of in ("rss", "device"))
        result |= {f"{side}_tok_s": tokens / step, f"{side}_peak_mib": peak, f"{side}_phases_s": phases}
        if gpu_peak:
            result[f"{side}_device_peak_mib"] = peak = gpu_peak
        if side != "ours":
            result["ratio" if side == "trl" else "ratio_tuned"] = ratio
        row = f"{side:10}{tokens / step:8.0f}{step:8.2f}{peak:10.0f}{ratio:7.2f}"
        print(row + "".join(f"{phases.get(name, float('nan')):9.2f}" for name in names))
    finish(result, args.json)


if __name__ == "__main__":
    main()
