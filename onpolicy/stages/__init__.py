"""The phases of a run. A stage says where a step's rollouts come from, who scores them and how they teach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from onpolicy.processes import Share

if TYPE_CHECKING:
    from collections.abc import Sequence

    from onpolicy.batching import Batch
    from onpolicy.teachers import Verdict
    from onpolicy.types import Rollout
    from onpolicy.updates import Update

ALONE = Share()  # everything is this process's


@dataclass(frozen=True)
class StageSettings:
    """What the trainer needs to know of a stage."""

    name: str  # "warm_start" or "on_policy"
    steps: int
    learning_rate: float  # peak
    updates_per_step: int


class Stage(Protocol):
    """A phase of training. Everything it draws is determined by the seed, the step and its state."""

    settings: StageSettings
    update: Update
    begins_with: str | None  # the phase that begin() is part of, None where it is only a start

    def begin(self, policy_version: int) -> None:
        """Called once, before the first of the remaining steps."""

    def rollouts(self, step: int, share: Share = ALONE) -> list[list[Rollout]]:
        """A step's completions, one list for each of its prompts; empty where the prompt is another process's."""

    def score(self, batch: Batch, rollouts: Sequence[Rollout]) -> Verdict:
        """What is said of a batch that was packed from ``rollouts``."""

    def after_step(self, policy_version: int) -> None:
        """The student changed: bring a sampler up to date, where the stage has one."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
