"""Where a step's rollouts come from, without any model: a sampler that says what it was asked for."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from onpolicy.health_config import HealthConfig
from onpolicy.processes import Share
from onpolicy.seeds import derive
from onpolicy.stages import StageSettings
from onpolicy.stages.on_policy import OnPolicy
from onpolicy.trainer import split
from onpolicy.types import Prompt, Rollout, SamplingParams

PROMPTS = [Prompt(f"p{i}", (1, i), completion_ids=(7, 8, 9)) for i in range(12)]
SAMPLES = 2


class Asked:
    """Draws [prompt's number, sample], and keeps the parameters of every call."""

    policy_version, source = 3, "student"

    def __init__(self) -> None:
        self.calls: list[SamplingParams] = []

    def generate(self, prompts, params) -> list[Rollout]:
        self.calls.append(params)
        return [
            Rollout(p, np.array([p.token_ids[1], n]), np.zeros(2, np.float32), "stop", 3, n)
            for p in prompts
            for n in range(params.n)
        ]


class InOrder:
    """Every step the same prompts."""

    def next_batch(self, count: int) -> list[Prompt]:
        return PROMPTS[:count]


def stage(lmbda: float) -> OnPolicy:
    settings = StageSettings("on_policy", 5, 1e-3, 1)
    made = OnPolicy(
        None, None, None, InOrder(), SamplingParams(n=SAMPLES, max_tokens=2), None, settings,  # type: ignore[arg-type]
        prompts_per_step=len(PROMPTS), lmbda=lmbda, seed=4, health=HealthConfig(),
    )  # fmt: skip
    made.sampler = Asked()  # type: ignore[assignment]
    return made


def sources(groups: list[list[Rollout]]) -> list[str]:
    """Of each prompt's rollouts."""
    return [rollout.source for group in groups for rollout in group[:1]]


@pytest.mark.parametrize(("lmbda", "expected"), [(1.0, "student"), (0.0, "dataset")])
def test_at_its_ends_lmbda_leaves_nothing_to_chance(lmbda, expected) -> None:
    groups = stage(lmbda).rollouts(0)
    assert sources(groups) == [expected] * len(PROMPTS)
    assert [len(group) for group in groups] == [SAMPLES if lmbda else 1] * len(PROMPTS)
    if not lmbda:  # the dataset's text, cut to the limit, drawn by no sampler
        assert all(g[0].completion_ids.tolist() == [7, 8] and np.isnan(g[0].logprobs).all() for g in groups)


@pytest.mark.parametrize("step", [0, 1])
def test_between_them_a_seeded_coin_decides_prompt_by_prompt(step) -> None:
    coins = random.Random(derive(4, "lmbda", step))
    expected = ["student" if coins.random() < 0.5 else "dataset" for _ in PROMPTS]
    made = stage(0.5)
    groups = made.rollouts(step)
    assert sources(groups) == expected and set(expected) == {"student", "dataset"}
    assert [group[0].prompt.id for group in groups] == [prompt.id for prompt in PROMPTS]
    assert made.sampler.calls == [replace(made.params, seed=derive(4, "rollouts", step))]  # type: ignore[attr-defined]
    assert all(rollout.completion_ids[0] == i for i, g in enumerate(groups) if len(g) == SAMPLES for rollout in g)


def test_a_steps_updates_are_mixtures() -> None:
    """Not the student's completions first, and the dataset's in the last update."""
    for part in split(stage(0.5).rollouts(1), 2):
        assert {rollout.source for rollout in part} == {"student", "dataset"}


def test_processes_share_the_sampling_and_agree_on_the_order() -> None:
    whole = stage(0.5).rollouts(1)
    shares = [stage(0.5).rollouts(1, Share(p, 3)) for p in range(3)]
    for i, group in enumerate(whole):
        holders = [share[i] for share in shares if share[i]]
        assert len(holders) == 1 and [(r.source, r.sample_index) for r in holders[0]] == [
            (r.source, r.sample_index) for r in group
        ]
    sampled = [sum(source == "student" for source in sources(share)) for share in shares]
    assert max(sampled) - min(sampled) <= 1
