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

    ``lmbda`` is the probability that a prompt is answered by the student, ``params.n`` times; the others use the
    dataset's own completion, once. GKD throws this coin for a whole batch; thrown for each prompt, a step is a mixture.
    ``grade``, where there is one, gives every completion its task reward as it is drawn, before any guard cuts it.
    """

    begins_with: str | None = None

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
        """One list a prompt, in the order of the prompts: sampled and given ones are spread over a step's updates."""
        prompts = self.order.next_batch(self.prompts_per_step)
        coins = random.Random(derive(self.seed, "lmbda", step))
        on_policy = [coins.random() < self.lmbda for _ in prompts]
        # Dealt out kind by kind: every process has its share of the sampling.
        kinds = sorted(range(len(prompts)), key=lambda i: not on_policy[i])
        mine = {i for place, i in enumerate(kinds) if share.has(place)}
        drawn = iter(self._sample([prompts[i] for i in sorted(mine) if on_policy[i]], step))
        groups: list[list[Rollout]] = [[] for _ in prompts]
        for i in sorted(mine):
            groups[i] = next(drawn) if on_policy[i] else [self._text(prompts[i])]
        return groups

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
