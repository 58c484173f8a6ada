"""How long a run will take, from one small batch of rollouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from onpolicy.batching import Batch, pack
from onpolicy.config import TrainConfig
from onpolicy.doctor.findings import Finding
from onpolicy.metrics import wait_for_gpu
from onpolicy.updates import PolicyGradientUpdate, loss_share, make_update

if TYPE_CHECKING:
    from onpolicy.student import Student
    from onpolicy.teachers.panel import Panel
    from onpolicy.types import Rollout


@dataclass(frozen=True)
class Speed:
    """Measured on one small batch of rollouts."""

    rollout: float  # seconds a completion token, decoded at the run's width
    score: float  # seconds a position
    update: float  # seconds a position, forward and backward
    apply: float  # seconds of an optimizer update
    sync: float  # seconds
    saved: float  # bytes a position kept for the backward pass


def measure(
    student: Student, panel: Panel, rollouts: Sequence[Rollout], config: TrainConfig
) -> tuple[float, float, float, float]:
    """(score, update, apply, saved) of :class:`Speed`. The weights stay as they are; gradients are cleared."""
    update = make_update(config)
    batches = [batch.to(student.device) for batch in
               pack(rollouts, config.batching.token_budget, share_prompts=config.batching.share_prompts)]  # fmt: skip
    positions = sum(batch.num_inputs for batch in batches)

    def learn(some: Sequence[Batch]) -> None:
        for batch in some:
            hidden, head = student(batch)
            verdict = panel.judge(batch)
            if isinstance(update, PolicyGradientUpdate) and update.whitens:  # as the trainer, in a pass of its own
                with torch.no_grad():
                    update.moments(batch, *student(batch), verdict)
            denominator = loss_share(batch, config.optim.normalize)
            update(batch, hidden, head, verdict, denominator, student.head_grad()).loss.backward()

    saved = saved_bytes(lambda: learn(batches[:1]), student.model) / batches[0].num_inputs  # and a warm-up
    score = _timed(lambda: [panel.judge(batch) for batch in batches])
    both = _timed(lambda: learn(batches))
    # A learning rate of 0 leaves every weight as it is.
    optimizer = torch.optim.AdamW(student.trainable().values(), lr=0.0, weight_decay=0.0, fused=True)
    optimizer.step()
    apply = _timed(optimizer.step)
    optimizer.zero_grad(set_to_none=True)
    return score / positions, max(both - score, 0.0) / positions, apply, saved


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    wait_for_gpu()
    return time.perf_counter() - start


def saved_bytes(work: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of ``work``.

    Parameters are not counted; their casts to a lower precision are.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(seen.values())


def throughput(speed: Speed, teacher_share: float, prompt_tokens: float, config: TrainConfig, engine: str) -> Finding:
    """Seconds a step and of the whole run, if every completion is as long as allowed.

    Args:
        teacher_share: the teacher's parameters by the student's: how much dearer its decoding is taken to be.
        prompt_tokens: of a prompt, on average.
    """
    sampling = config.sampling
    n, length = sampling.samples_per_prompt, sampling.max_tokens
    copies = 1 if config.batching.share_prompts else n
    positions = config.prompts_per_step * (copies * prompt_tokens + n * length)
    phases = {
        "rollout": speed.rollout * config.prompts_per_step * n * length,
        "score": speed.score * positions,
        "update": speed.update * positions + speed.apply * config.optim.updates_per_step,
        "sync": speed.sync,
    }
    step = sum(phases.values())
    whole = {"on-policy": config.steps * step, **_around(speed, teacher_share, prompt_tokens, config)}
    rounded = lambda parts: ", ".join(f"{k} {v:,.1f}" for k, v in parts.items())  # noqa: E731
    found = (
        f"a step takes up to {step:,.1f} s ({rounded(phases)}), the whole run about {sum(whole.values()) / 60:,.1f} "
        f"minutes (seconds: {rounded(whole)}), if no completion ends early"
    )
    if phases["rollout"] <= 0.8 * step or engine == "vllm":
        return Finding("ok", "throughput", found)
    return Finding(
        "note", "throughput", found, "generation dominates the step (trl#4568)",
        "install vLLM (`make setup` on a CPU): it decodes many sequences together",
    )  # fmt: skip


def _around(speed: Speed, teacher_share: float, prompt_tokens: float, config: TrainConfig) -> dict[str, float]:
    """Seconds of what is not on-policy training, as :func:`throughput`; the teacher draws and is scored but once."""
    warm, evaluation, length = config.warm_start, config.evaluation, config.sampling.max_tokens
    drawn = warm.num_prompts * warm.samples_per_prompt
    tokens = evaluation.num_prompts * evaluation.max_tokens
    # Held out, a sampled and a greedy completion of each prompt.
    seconds = {"teacher's samples": (drawn * length + 2 * tokens) * speed.rollout * teacher_share}
    if drawn:
        positions = warm.num_prompts * prompt_tokens + drawn * length
        updates = warm.epochs * drawn / warm.rollouts_per_step
        seconds["warm start"] = positions * (speed.score + warm.epochs * speed.update) + updates * speed.apply
    if tokens:
        times = 3 if drawn and config.steps else 2
        positions = tokens + evaluation.num_prompts * prompt_tokens
        # Each time the student draws its own and reads the teacher's too; forward is a third of an update.
        each = 2 * tokens * speed.rollout + 2 * positions * speed.score + 4 * positions * speed.update / 3
        seconds["evaluation"] = times * each + 2 * positions * speed.score
    return seconds
