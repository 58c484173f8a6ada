"""The student samples, and learns on the prefixes it visits itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from onpolicy.batching import Batch, text_rollout
from onpolicy.guards import max_tokens_at
from onpolicy.health_config import HealthConfig
from onpolicy.prompts import PromptOrder
from onpolicy.rollouts.base import Sampler
from onpolicy.seeds import derive
from onpolicy.stages import StageSettings
from onpolicy.student import Student
from onpolicy.teachers import Score, Teacher
from onpolicy.types import Prompt, Rollout, SamplingParams
from onpolicy.updates import Update


class OnPolicy:
    """Draws a step's rollouts from the sampler and gives it the new weights after every step.

    ``lmbda`` is GKD's share of prompts sampled by the student; the others use the dataset's own completion.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        open_sampler: Callable[[], Sampler],
        order: PromptOrder,
        params: SamplingParams,
        update: Update,
        settings: StageSettings,
        *,
        prompts_per_step: int,
        lmbda: float,
        seed: int,
        health: HealthConfig,
    ):
        self.student, self.teacher, self.order, self.params = student, teacher, order, params
        self._open_sampler = open_sampler
        self.update, self.settings = update, settings
        self.prompts_per_step, self.lmbda, self.seed = prompts_per_step, lmbda, seed
        self.health = health

    def begin(self, policy_version: int) -> None:
        """Start the sampler, if nothing has yet, with the student as it is now."""
        self.sampler = self._open_sampler()
        self.after_step(policy_version)

    def rollouts(self, step: int) -> list[Rollout]:
        prompts = self.order.next_batch(self.prompts_per_step)
        coins = random.Random(derive(self.seed, "lmbda", step))
        sampled: list[Prompt] = []
        texts: list[Rollout] = []
        for prompt in prompts:
            if coins.random() < self.lmbda:
                sampled.append(prompt)
            else:
                assert prompt.completion_ids is not None  # checked before the run (validate.py)
                kept = prompt.completion_ids[: self.params.max_tokens]
                texts.append(text_rollout(prompt, kept, self.sampler.policy_version))
        max_tokens = max_tokens_at(step, self.health, self.params.max_tokens)
        params = replace(self.params, seed=derive(self.seed, "rollouts", step), max_tokens=max_tokens)
        return (self.sampler.generate(sampled, params) if sampled else []) + texts

    def score(self, batch: Batch, rollouts: Sequence[Rollout]) -> Score:
        return self.teacher.score(batch)

    def after_step(self, policy_version: int) -> None:
        self.sampler.sync(self.student.weights(), policy_version)

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)
