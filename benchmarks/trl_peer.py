"""The peer of benchmarks/train_step.py: N steps of TRL's ``DistillationTrainer``, in a process of its own.

    python -m benchmarks.trl_peer --student DIR --teacher DIR --prompts FILE.jsonl

It does the work that ours does: sample one completion of exactly ``--completion-length`` tokens for each of
``--rollouts`` prompts at temperature 1, let the teacher score them, step AdamW on the reverse KL (beta 1, fully
on-policy). The last line is one JSON object; see :func:`main`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import device_peak_mib, finish, peak_rss_mib, tuned_cpu_env

if TYPE_CHECKING:
    from collections.abc import Iterator


def environment() -> dict[str, str]:
    """Environment additions for the peer's process: those of every benchmark, and glibc told to keep large blocks.

    TRL's loss on a CPU allocates and frees tiles of many megabytes for each of its elementwise operations; handing
    them back to the kernel every time costs it much of the loss's time. A preloaded tcmalloc ignores these settings.
    """
    keep = str(2**33)
    return tuned_cpu_env() | {"MALLOC_MMAP_THRESHOLD_": keep, "MALLOC_TRIM_THRESHOLD_": keep}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True, help="directory of the student")
    parser.add_argument("--teacher", required=True, help="directory of the teacher")
    parser.add_argument("--prompts", required=True, help='jsonl, each line {"messages": [{"role", "content"}, ...]}')
    parser.add_argument("--rollouts", type=int, default=32, help="rollouts a step (default: %(default)s)")
    parser.add_argument("--completion-length", type=int, default=96, help="tokens (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, help="rollouts a backward pass (default: %(default)s)")
    parser.add_argument(
        "--precision",
        choices=("bf16", "autocast", "mixed"),
        default="bf16",
        help="bf16: both models' weights; autocast: fp32 weights; mixed: fp32 student, bf16 teacher (default: bf16)",
    )
    parser.add_argument("--cache", default=None, help="cache_implementation of generate, e.g. static")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", help="also write the result there, with its provenance")
    return parser.parse_args()


def read_prompts(path: Path, count: int) -> list[list[dict[str, str]]]:
    """The first ``count`` conversations, from the top again where there are fewer; an assistant's answer is dropped.

    Raises ValueError when the file holds none.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"no prompts in {path}: one JSON object with `messages` a line is expected")
    prompts = [[message for message in line["messages"] if message["role"] != "assistant"] for line in lines]
    return [prompts[index % len(prompts)] for index in range(count)]


class Clock:
    """Seconds and tokens by step and phase."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._began = 0.0
        self._cpu_began = 0.0
        self._phases = {"rollout": 0.0, "score": 0.0, "tokens": 0.0}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._phases[name] += time.perf_counter() - began

    def count(self, tokens: int) -> None:
        self._phases["tokens"] += tokens

    def begin(self) -> None:
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def end_step(self) -> None:
        """Close a step: all its time, the data loader's and the optimizer's too, up to the start of the next."""
        now, cpu_now = time.perf_counter(), time.process_time()
        seconds = now - self._began
        update = seconds - self._phases["rollout"] - self._phases["score"]
        self.steps.append({"seconds": seconds, "cpu": cpu_now - self._cpu_began, "update": update, **self._phases})
        self._phases = dict.fromkeys(self._phases, 0.0)
        self._began, self._cpu_began = now, cpu_now


def build_trainer(args: argparse.Namespace, scratch: str, clock: Clock) -> Any:
    """TRL's trainer with a stopwatch, in the fastest of its configurations that were tried on a CPU.

    Its vLLM modes are no option there (colocate: ``'Parameter' object has no attribute 'weight_loader'``; the server
    mode synchronises over NCCL), so it generates with transformers.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end_step()

    class Timed(DistillationTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, *inputs: Any, **options: Any) -> Any:
            with clock.phase("rollout"):
                completions = super()._generate_single_turn(*inputs, **options)
            clock.count(sum(map(len, completions)))
            return completions

        def _get_last_hidden_state(self, *inputs: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():  # the student's pass belongs to the update
                return super()._get_last_hidden_state(*inputs, **options)
            with clock.phase("score"):
                return super()._get_last_hidden_state(*inputs, **options)

    # bf16 weights by default: under autocast every decoded token casts all weights anew, and the step takes longer.
    def load(directory: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)

    student_dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    teacher_dtype = torch.float32 if args.precision == "autocast" else torch.bfloat16
    if args.rollouts % args.micro_batch:
        raise ValueError(f"--micro-batch {args.micro_batch} must divide --rollouts {args.rollouts}")
    total = args.warmup + args.steps
    config = DistillationConfig(
        output_dir=scratch,
        max_steps=total,
        # All rollouts are generated together whatever this is. The passes take as much processor time in eights as all
        # at once, and far less memory.
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.rollouts // args.micro_batch,
        beta=1.0,  # reverse KL
        temperature=1.0,
        max_completion_length=args.completion_length,
        # No end token before the last position: both sides then train on the same number of tokens.
        generation_kwargs={"min_new_tokens": args.completion_length},
        cache_implementation=args.cache,
        gradient_checkpointing=False,  # memory is no concern at this size; recomputing would only cost time
        bf16=args.precision != "bf16",  # autocast; with bf16 weights there is nothing left to cast
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    return Timed(
        model=load(args.student, student_dtype),
        teacher_model=load(args.teacher, teacher_dtype),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": read_prompts(Path(args.prompts), total * args.rollouts)}),
        processing_class=AutoTokenizer.from_pretrained(args.student, padding_side="left", local_files_only=True),
        callbacks=[Stopwatch()],
    )


def summarise(steps: list[dict[str, float]], args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the measured steps; raises RuntimeError when a step did other work than it was asked for."""
    asked = args.rollouts * args.completion_length
    measured = steps[args.warmup :]
    if any(step["tokens"] != asked for step in measured):
        raise RuntimeError(f"{asked} completion tokens a step were asked for, got {[s['tokens'] for s in measured]}")
    median = statistics.median(step["seconds"] for step in measured)
    return {
        "step_s": median,
        "tok_s": asked / median,
        "tokens_per_step": asked,
        "phases_s": {key: statistics.median(s[key] for s in measured) for key in ("rollout", "score", "update")},
        "steps_s": [step["seconds"] for step in measured],
        "cpu_s": statistics.median(step["cpu"] for step in measured),
    }


def main() -> None:
    """Print ``{"step_s", "tok_s", "tokens_per_step", "phases_s", "steps_s", "cpu_s", "losses", "peak_rss_mib",
    "peak_device_mib", "config"}``.

    ``phases_s``: rollout (generate), score (the teacher's transformer), update (all the rest: the student's passes,
    both heads in the chunked loss, AdamW). Times are medians in seconds; ``cpu_s`` is the processor time of a step,
    which a busy machine distorts less than ``step_s``. Losses are of all steps, the warm-up's first.
    """
    args = parse_args()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(args, scratch, clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = summarise(clock.steps, args) | {
        "losses": losses,
        "peak_rss_mib": peak_rss_mib(),
        "peak_device_mib": device_peak_mib(),
        "config": {
            "precision": args.precision,
            "micro_batch": args.micro_batch,
            "cache": args.cache or "dynamic",
            "threads": torch.get_num_threads(),
        },
    }
    finish(result, args.json)


if __name__ == "__main__":
    main()
