"""The student samples, and learns on the prefixes it visits itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from onpolicy.batching import Batch, text_rollout
from onpolicy.guards import max_tokens_at
from onpolicy.health_config import HealthConfig
from onpolicy.processes import Share
from onpolicy.prompts import PromptOrder
from onpolicy.rollouts.base import Sampler
from onpolicy.seeds import derive
from onpolicy.stages import ALONE, StageSettings
from onpolicy.student import Student
from onpolicy.task import Grade
from onpolicy.teachers import Verdict
from onpolicy.teachers.panel import Panel
from onpolicy.types import Prompt, Rollout, SamplingParams
from onpolicy.updates import Update


class OnPolicy:
    """Draws a step's rollouts from the sampler and gives it the new weights after every step.

    ``lmbda`` is GKD's share of prompts sampled by the student; the others use the dataset's own completion.
    ``grade``, where there is one, gives every completion its task reward as it is drawn, before any guard cuts it.
    """

    def __init__(
        self,
        student: Student,
        panel: Panel,
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
        grade: Grade | None = None,
    ):
        self.student, self.panel, self.order, self.params = student, panel, order, params
        self._open_sampler = open_sampler
        self.update, self.settings = update, settings
        self.prompts_per_step, self.lmbda, self.seed = prompts_per_step, lmbda, seed
        self.health, self.grade = health, grade

    def begin(self, policy_version: int) -> None:
        """Start the sampler, if nothing has yet, with the student as it is now."""
        self.sampler = self._open_sampler()
        self.after_step(policy_version)

    def rollouts(self, step: int, share: Share = ALONE) -> list[list[Rollout]]:
        """One list a prompt: those the student samples first, then the dataset's own completions."""
        prompts = self.order.next_batch(self.prompts_per_step)
        coins = random.Random(derive(self.seed, "lmbda", step))
        on_policy = [coins.random() < self.lmbda for _ in prompts]
        sampled = [prompt for prompt, chosen in zip(prompts, on_policy, strict=True) if chosen]
        given = [prompt for prompt, chosen in zip(prompts, on_policy, strict=True) if not chosen]
        mine = [prompt for i, prompt in enumerate(sampled) if share.has(i)]
        drawn = iter(self._sample(mine, step))
        groups = [next(drawn) if share.has(i) else [] for i in range(len(sampled))]
        texts = enumerate(given, start=len(sampled))
        return groups + [[self._text(prompt)] if share.has(i) else [] for i, prompt in texts]

    def _sample(self, prompts: list[Prompt], step: int) -> list[list[Rollout]]:
        """The student's completions of each prompt."""
        if not prompts:
            return []
        max_tokens = max_tokens_at(step, self.health, self.params.max_tokens)
        params = replace(self.params, seed=derive(self.seed, "rollouts", step), max_tokens=max_tokens)
        rollouts = self.sampler.generate(prompts, params)
        if self.grade is not None:
            rollouts = [replace(rollout, task_reward=self.grade(rollout)) for rollout in rollouts]
        return [rollouts[i : i + params.n] for i in range(0, len(rollouts), params.n)]

    def _text(self, prompt: Prompt) -> Rollout:
        """The dataset's completion."""
        assert prompt.completion_ids is not None  # checked before the run (checks.check_completions)
        return text_rollout(prompt, prompt.completion_ids[: self.params.max_tokens], self.sampler.policy_version)

    def score(self, batch: Batch, rollouts: Sequence[Rollout]) -> Verdict:
        return self.panel.judge(batch, rollouts)

    def after_step(self, policy_version: int) -> None:
        self.sampler.sync(self.student.weights(), policy_version)

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)
