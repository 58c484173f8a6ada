"""Forward KL on the teacher's own samples: what makes a pruned student fit to sample for itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from onpolicy.batching import Batch, pack
from onpolicy.processes import Share
from onpolicy.seeds import derive
from onpolicy.stages import ALONE, StageSettings
from onpolicy.teachers import Score, Teacher, Verdict
from onpolicy.types import Rollout
from onpolicy.updates import Update


class WarmStart:
    """Passes over a fixed set of rollouts, whole prompts at a time, in an order that depends on seed and step alone.

    The teacher scores them once, before the first step and in batches of one fixed composition (so a resumed run gets
    the same bits); the hidden states are kept, on the CPU, for all epochs: 2 bytes x tokens x hidden size.
    """

    begins_with: str | None = "score"

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        teacher: Teacher,
        update: Update,
        *,
        token_budget: int,
        share_prompts: bool,
        progress: Callable[[int], None],
        epochs: int,
        rollouts_per_step: int,
        learning_rate: float,
        seed: int,
    ):
        self.all_rollouts, self.teacher, self.progress = rollouts, teacher, progress
        self.token_budget, self.share_prompts = token_budget, share_prompts
        self.hidden: dict[tuple[str, int], torch.Tensor] = {}  # (prompt id, sample index) -> [L, D_T]
        self.head = torch.empty(0)
        groups: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            groups.setdefault(rollout.prompt.id, []).append(rollout)
        self.groups = list(groups.values())
        self.groups_per_step = max(1, rollouts_per_step // max(len(group) for group in self.groups))
        self.steps_per_epoch = -(-len(self.groups) // self.groups_per_step)
        self.update, self.seed = update, seed
        self.settings = StageSettings("warm_start", epochs * self.steps_per_epoch, learning_rate, updates_per_step=1)

    def begin(self, policy_version: int) -> None:
        """Score every rollout, unless it is done."""
        if self.hidden:
            return
        for batch in pack(self.all_rollouts, self.token_budget, share_prompts=self.share_prompts):
            score = self.teacher.score(batch)
            self.head = score.head
            lengths = torch.bincount(batch.sequence_ids).tolist()
            for index, hidden in zip(batch.indices, score.hidden.cpu().split(lengths), strict=True):
                self.hidden[key(self.all_rollouts[index])] = hidden.clone()
            self.progress(len(batch.token_ids))

    def rollouts(self, step: int, share: Share = ALONE) -> list[list[Rollout]]:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.groups)))
        random.Random(derive(self.seed, "warm start", epoch)).shuffle(order)
        chosen = order[index * self.groups_per_step : (index + 1) * self.groups_per_step]
        return [self.groups[group] if share.has(i) else [] for i, group in enumerate(chosen)]

    def score(self, batch: Batch, rollouts: Sequence[Rollout]) -> Verdict:
        hidden = torch.cat([self.hidden[key(rollouts[index])] for index in batch.indices])
        return Verdict((Score(hidden.to(batch.token_ids.device), self.head),))

    def after_step(self, policy_version: int) -> None:
        """Nothing samples from the student here."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def key(rollout: Rollout) -> tuple[str, int]:
    """What tells the rollouts of a warm start apart."""
    return rollout.prompt.id, rollout.sample_index
