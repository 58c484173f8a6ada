"""Several models and the task as one judge of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from onpolicy.models import check_shared_prompts, load_causal_lm
from onpolicy.teachers import Score, Teacher, Verdict
from onpolicy.teachers.local import LocalTeacher

if TYPE_CHECKING:
    from onpolicy.batching import Batch
    from onpolicy.config import TrainConfig
    from onpolicy.types import Rollout


class Panel:
    """The teachers with their weights and, for reward extrapolation, a reference model.

    One forward pass each, of which only hidden states stay: memory grows by D_T numbers a token for every model.
    """

    def __init__(
        self, teachers: Sequence[Teacher], weights: Sequence[float] = (1.0,), reference: Teacher | None = None
    ):
        assert len(teachers) == len(weights) and min(weights) > 0
        self.teachers, self.reference = tuple(teachers), reference
        self.weights = tuple(weight / sum(weights) for weight in weights)

    def models(self) -> list[torch.nn.Module]:
        """What of it lies in memory."""
        voices = [*self.teachers, self.reference]
        return [voice.model for voice in voices if isinstance(voice, LocalTeacher)]

    def judge(self, batch: Batch, rollouts: Sequence[Rollout] = ()) -> Verdict:
        """What all say of a batch packed from ``rollouts``; the task only where these carry its rewards."""
        scores: list[Score] = [teacher.score(batch) for teacher in self.teachers]
        reference = None if self.reference is None else self.reference.score(batch)
        return Verdict(tuple(scores), self.weights, reference, task_rewards(batch, rollouts))


def task_rewards(batch: Batch, rollouts: Sequence[Rollout]) -> torch.Tensor | None:
    """[B] float32 rewards of the batch's rollouts; None where they have none."""
    rewards = [rollouts[index].task_reward for index in batch.indices] if rollouts else [None]
    known = [reward for reward in rewards if reward is not None]
    if len(known) < len(rewards):
        return None
    return torch.tensor(known, dtype=torch.float32, device=batch.token_ids.device)


def open_panel(
    config: TrainConfig, teacher: LocalTeacher, device: torch.device | str = "cpu", used: int | None = None
) -> Panel:
    """The first teacher, and what the configuration names beside it, loaded. ValueError as ``load_causal_lm``.

    ``used``: ids of the tokenizer that all share.
    The first alone where no on-policy step is to follow: nothing else asks the others.
    """
    if not config.steps:
        return Panel([teacher])

    def load(name: str, dtype: str) -> LocalTeacher:
        model = load_causal_lm(name, getattr(torch, dtype), device)
        if config.batching.share_prompts:
            check_shared_prompts(model)
        return LocalTeacher(model, used)

    settings = config.policy_gradient
    reference = None
    if config.algorithm == "policy_gradient" and settings.reference_model is not None:
        reference = load(settings.reference_model, config.teacher.dtype)
    others = [load(other.model, other.dtype) for other in config.other_teachers]
    weights = [each.weight for each in (config.teacher, *config.other_teachers)]
    return Panel([teacher, *others], weights, reference)
