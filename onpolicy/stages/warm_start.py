"""Forward KL on the teacher's own samples: what makes a pruned student fit to sample for itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from onpolicy.seeds import derive
from onpolicy.stages import StageSettings
from onpolicy.types import Rollout
from onpolicy.updates import Update


class WarmStart:
    """Passes over a fixed set of rollouts, whole prompts at a time, in an order that depends on seed and step alone."""

    def __init__(
        self,
        rollouts: Sequence[Rollout],
        update: Update,
        *,
        epochs: int,
        rollouts_per_step: int,
        learning_rate: float,
        seed: int,
    ):
        groups: dict[str, list[Rollout]] = {}
        for rollout in rollouts:
            groups.setdefault(rollout.prompt.id, []).append(rollout)
        self.groups = list(groups.values())
        self.groups_per_step = max(1, rollouts_per_step // max(len(group) for group in self.groups))
        self.steps_per_epoch = -(-len(self.groups) // self.groups_per_step)
        self.update, self.seed = update, seed
        self.settings = StageSettings("warm_start", epochs * self.steps_per_epoch, learning_rate, updates_per_step=1)

    def begin(self, policy_version: int) -> None:
        """Nothing to start."""

    def rollouts(self, step: int) -> list[Rollout]:
        epoch, index = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.groups)))
        random.Random(derive(self.seed, "warm start", epoch)).shuffle(order)
        chosen = order[index * self.groups_per_step : (index + 1) * self.groups_per_step]
        return [rollout for group in chosen for rollout in self.groups[group]]

    def after_step(self, policy_version: int) -> None:
        """Nothing samples from the student here."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
