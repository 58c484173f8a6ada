"""Do new weights reach the sampler? What is trained is perturbed in memory, handed over, compared, and put back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from onpolicy.config import BatchingConfig
from onpolicy.doctor.findings import Finding
from onpolicy.doctor.sampler import ROUNDING, Comparison, Reference, compare, compare_with_floor, mean_finite
from onpolicy.rollouts.base import Sampler
from onpolicy.student import Student
from onpolicy.types import Prompt, Rollout, SamplingParams

_MOVED = 0.3  # nats by which a perturbation must move the trainer's log-probs,
_ABOVE_FLOOR = 5.0  # and times the rounding floor, so that it stands out
_SMALL = 0.01  # nats nobody minds
_FIRST_NUDGE, _NUDGE_GROWTH, _MOST_NUDGES = 0.02, 2.0, 10


@dataclass(frozen=True)
class Delivery:
    """A perturbed student, handed to the sampler."""

    moved: float  # mean nats by which the perturbation moved the trainer's log-probs of fixed tokens
    difference: float  # sampler against trainer after the sync
    floor: float  # of that, by rounding alone
    restored: float  # sampler against trainer after restoring and a second sync
    restored_floor: float
    seconds: float  # of a sync


def deliver(
    student: Student,
    sampler: Sampler,
    reference: Reference,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    batching: BatchingConfig,
) -> Delivery:
    """Nudge everything that is trained, sync, compare; put the weights back, sync, compare. Leaves no trace."""
    fixed, version = sampler.generate(prompts, params), sampler.policy_version
    compared, floor = compare_with_floor(student, reference, fixed, params, batching)
    with kept_weights(student):
        moved = _nudge_until_visible(student, fixed, compared, params, batching, floor)
        start = time.perf_counter()
        sampler.sync(student.weights(), version + 1)
        seconds = time.perf_counter() - start
        reference.follow(student)
        other = replace(params, seed=params.seed + 1)
        drawn = sampler.generate(prompts, other)
        nudged, nudged_floor = compare_with_floor(student, reference, drawn, other, batching)
    sampler.sync(student.weights(), version)
    reference.follow(student)
    again = sampler.generate(prompts, params)
    restored, restored_floor = compare_with_floor(student, reference, again, params, batching)
    return Delivery(moved, nudged.difference, nudged_floor, restored.difference, restored_floor, seconds)


def _nudge_until_visible(
    student: Student,
    fixed: Sequence[Rollout],
    before: Comparison,
    params: SamplingParams,
    batching: BatchingConfig,
    floor: float,
) -> float:
    """Perturb every kind of weight until it alone moves the log-probs of ``fixed`` well above rounding.

    Kind by kind, since engines lose weights by kind: a forgotten head would hide behind layers that move more.
    Returns by how much log-probs moved in all, mean nats.
    """
    now = before.unprocessed
    for parameters in kinds(student).values():
        start = now
        for attempt in range(_MOST_NUDGES):
            nudge(parameters, _FIRST_NUDGE * _NUDGE_GROWTH**attempt)
            now = compare(student, fixed, params, batching).unprocessed
            if mean_finite((now - start).abs()) >= max(_MOVED, _ABOVE_FLOOR * floor):
                break
    return mean_finite((now - before.unprocessed).abs())


def kinds(student: Student) -> dict[str, list[torch.nn.Parameter]]:
    """Trained parameters by what they belong to."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in student.trainable().items():
        marks = {"embed": "head", "lm_head": "head", "attn": "attention", "mlp": "mlp"}
        kind = next((kind for mark, kind in marks.items() if mark in name), "other")
        found.setdefault(kind, []).append(parameter)
    return found


def delivered(delivery: Delivery, lora: bool) -> Finding:
    """Did the sampler follow the trainer there and back, as closely as rounding allows?"""
    name, what = ("adapter delivery", "adapter") if lora else ("weight sync", "trained weights")
    found = (
        f"{what} perturbed: the trainer moved by {delivery.moved:.2g} nats, the sampler followed to "
        f"{delivery.difference:.2g} (rounding {delivery.floor:.2g}); restored: {delivery.restored:.2g} "
        f"(rounding {delivery.restored_floor:.2g}); a sync takes {delivery.seconds:.2f} s"
    )
    if delivery.moved < _MOVED:
        return Finding(
            "error", name, f"{found}: what is trained has no influence on the student's text",
            "the whole run would train nothing", "check student.lora.target_modules and student.freeze_embeddings",
        )  # fmt: skip
    pairs = ((delivery.difference, delivery.floor), (delivery.restored, delivery.restored_floor))
    if all(difference <= ROUNDING * floor + _SMALL for difference, floor in pairs):
        return Finding("ok", name, found)
    return Finding(
        "error", name, f"{found}: the sampler did not get all of them",
        "rollouts would come from a stale policy or a mixture of two; in verl#7495 weights went undelivered for months",
        "try --rollouts.engine transformers, or a version of the engine this project is tested with",
    )  # fmt: skip


@contextlib.contextmanager
def kept_weights(student: Student) -> Iterator[None]:
    """Whatever happens inside, the trained weights are afterwards what they were, to the bit."""
    saved = {name: parameter.detach().cpu().clone() for name, parameter in student.trainable().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in student.trainable().items():
                parameter.copy_(saved[name])


@torch.no_grad()
def nudge(parameters: Sequence[torch.nn.Parameter], size: float) -> None:
    """Add noise of ``size`` times each parameter's own magnitude (0.1 for zeros, as in a fresh adapter)."""
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:
        magnitude = float(parameter.square().mean().sqrt()) or 0.1
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        parameter.add_(noise, alpha=size * magnitude)
