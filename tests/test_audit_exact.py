"""Exact mode: right verifiers to rounding, broken ones by far more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spec.audit.exact import World, joint_gap, our_step, transformers_step, turning_point
from spec.verify import length_law


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("backend", ["reference", "numba", "torch"])
@pytest.mark.parametrize("seed", [0, 1])
def test_our_verifiers_are_exact(mode: str, backend: str, seed: int) -> None:
    step = our_step(mode, backend)  # type: ignore[arg-type]
    assert joint_gap(step, World(3, 2, seed=seed)) < 1e-12
    assert joint_gap(step, World(2, 3, seed=seed)) < 1e-12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_transformers_function_is_exact(seed: int) -> None:
    assert joint_gap(transformers_step, World(3, 2, seed=seed, zeros=False)) < 1e-12


def test_a_drafted_token_that_the_target_cannot_say_is_rejected_by_transformers_too() -> None:
    """Where p = q at a row its residual is 0/0, which no draw reaches; elsewhere zeros are no trouble."""
    assert joint_gap(transformers_step, World(3, 2, seed=5)) < 1e-12


def not_subtracted(target: Tensor, draft: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The residual is p."""
    lengths, _ = our_step("token", "reference")(target, draft, ids)
    return lengths, target


def greedy(target: Tensor, draft: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Accept iff argmax."""
    return length_law((target[:-1].argmax(-1) == ids).double(), "token"), target


@pytest.mark.parametrize("broken", [not_subtracted, greedy])
def test_broken_verifiers_are_not(broken: object) -> None:
    assert joint_gap(broken, World(3, 2, seed=0)) > 2e-3  # type: ignore[arg-type]


def test_the_world_sums_to_one_and_has_zeros() -> None:
    world = World(3, 2, seed=0)
    assert sum(world.text_law().values()) == pytest.approx(1, abs=1e-12)
    assert sum(weight for weight, _ in world.drafts()) == pytest.approx(1, abs=1e-12)
    rows = torch.stack([World(4, 2, seed=s).law(who, (s,)) for s in range(10) for who in (0, 1)])
    assert bool((rows == 0).any())


def test_turning_points() -> None:
    assert turning_point(lambda u: u <= 0.3) == pytest.approx(0.3, abs=1e-15)
    assert turning_point(lambda u: True) == 1 and turning_point(lambda u: False) < 1e-15
