"""Acceptance figures against hand-computed values, against enumeration and against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from spec import stats
from spec.verify import length_law


def test_acceptance_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]]), torch.tensor([[0.2, 0.2, 0.6], [0.0, 0.5, 0.5]])
    assert stats.expected_acceptance(p, q).tolist() == pytest.approx([0.6, 0.0])
    assert stats.expected_acceptance_from_logprobs(p.log(), q.log()).tolist() == pytest.approx([0.6, 0.0])
    assert stats.greedy_draft_acceptance(p, q).tolist() == pytest.approx([0.2, 0.0])
    assert stats.greedy_draft_acceptance(p.log(), q.log()).exp().tolist() == pytest.approx([0.2, 0.0])
    assert stats.greedy_agreement(p, p.flip(0)).tolist() == [1.0, 1.0]
    assert stats.greedy_agreement(p, q).tolist() == [0.0, 0.0]


def test_acceptance_from_bfloat16_logprobs_is_summed_in_float32() -> None:
    """In bfloat16 a sum of 4,096 equal terms would stall far below 1."""
    flat = torch.full((1, 4096), -math.log(4096)).bfloat16()
    value = stats.expected_acceptance_from_logprobs(flat, flat)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(4096 * math.exp(float(flat[0, 0])), rel=1e-5)


def test_expected_accepted_is_the_mean_of_the_length_law() -> None:
    accept = torch.rand(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(5, dtype=torch.float64)
    for mode in ("token", "block"):
        by_law = torch.stack([length_law(row, mode) @ steps for row in accept])
        torch.testing.assert_close(stats.expected_accepted(accept, mode), by_law)
        assert all(float(length_law(row, mode).sum()) == pytest.approx(1) for row in accept)


@pytest.mark.parametrize(("alpha", "length"), list(itertools.product((0.0, 0.3, 0.8, 0.999999), (0, 1, 4))))
def test_block_efficiency_is_the_mean_of_enumerated_steps(alpha: float, length: int) -> None:
    mean = sum((i + 1) * alpha**i * ((1 - alpha) if i < length else 1) for i in range(length + 1))
    assert stats.block_efficiency(alpha, length) == pytest.approx(mean, rel=1e-12)
    assert stats.block_efficiency(alpha, length) == pytest.approx((1 - alpha ** (length + 1)) / (1 - alpha), rel=1e-9)


def test_limits_of_efficiency_and_speedup() -> None:
    assert stats.block_efficiency(1.0, 4) == 5
    assert stats.block_efficiency(0.7, 0) == 1
    assert stats.predicted_speedup(0.9, 0, 0.3) == 1
    assert stats.predicted_speedup(0.5, 2, 0.25) == pytest.approx(1.75 / 1.5)
    assert stats.predicted_speedup(0.0, 3, 0.1) == pytest.approx(1 / 1.3)


def test_best_draft_length() -> None:
    assert stats.best_draft_length(0.0, 0.1) == 0
    assert stats.best_draft_length(0.3, 0.5) == 0  # drafting costs more than it brings
    assert stats.best_draft_length(1.0, 0.1, longest=7) == 7
    for alpha, cost in itertools.product((0.2, 0.5, 0.8), (0.01, 0.1, 0.4)):
        best = stats.best_draft_length(alpha, cost)
        scores = [stats.predicted_speedup(alpha, length, cost) for length in range(17)]
        assert scores[best] == max(scores)


def test_acceptance_by_position_by_hand() -> None:
    """Four steps: drafted 3, 3, 2, 0; accepted 3, 1, 0, 0."""
    result = stats.acceptance_by_position([3, 1, 0, 0], [3, 3, 2, 0])
    np.testing.assert_allclose(result.conditional, [2 / 3, 1 / 2, 1 / 1])
    np.testing.assert_allclose(result.unconditional, [2 / 3, 1 / 3, 1 / 2])
    assert result.reached.tolist() == [3, 2, 1] and result.drafted.tolist() == [3, 3, 2]
    assert stats.tokens_per_step([3, 1, 0, 0]) == 2
    never = stats.acceptance_by_position([0, 0], [2, 1])
    assert never.conditional[0] == 0 and math.isnan(never.conditional[1]) and never.unconditional[1] == 0


def test_counted_and_expected_positions_agree() -> None:
    """With constant acceptance a, conditional is a and unconditional a^i at every position."""
    rng = np.random.default_rng(0)
    passes = rng.random((200_000, 3)) < 0.6
    result = stats.acceptance_by_position(passes.cumprod(1).sum(1), np.full(200_000, 3))
    np.testing.assert_allclose(result.conditional, [0.6] * 3, atol=0.006)
    np.testing.assert_allclose(result.unconditional, [0.6, 0.36, 0.216], atol=0.006)


def prompts(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that share a prompt effect: 20 a prompt, true mean 0.5."""
    effect = rng.normal(0.5, 0.1, size=groups)
    labels = np.repeat(np.arange(groups), 20)
    return effect[labels] + rng.normal(0, 0.1, size=len(labels)), labels


def test_clustered_intervals_cover_and_naive_ones_do_not() -> None:
    rng = np.random.default_rng(1)
    covered = {"robust": 0, "bootstrap": 0, "naive": 0}
    for trial in range(300):
        values, labels = prompts(rng, 30)
        intervals = {
            "robust": stats.cluster_robust(values, labels),
            "bootstrap": stats.cluster_bootstrap(values, labels, draws=400, seed=trial),
            "naive": stats.cluster_robust(values, np.arange(len(values))),
        }
        for name, interval in intervals.items():
            covered[name] += interval.lo <= 0.5 <= interval.hi
    assert 0.92 <= covered["robust"] / 300 <= 0.98
    assert 0.89 <= covered["bootstrap"] / 300 <= 0.98
    assert covered["naive"] / 300 < 0.7


def test_robust_interval_of_singletons_is_the_t_interval() -> None:
    """With one value a prompt the formula is the textbook one: 1..5 has mean 3, s = sqrt(2.5), t_4 = 2.776445."""
    interval = stats.cluster_robust([1, 2, 3, 4, 5], list("abcde"))
    half = 2.7764451 * math.sqrt(2.5 / 5)
    assert (interval.mean, interval.lo, interval.hi) == pytest.approx((3, 3 - half, 3 + half))
    assert interval.clusters == 5


@pytest.mark.parametrize(("groups", "t95"), [(2, 12.7062), (3, 4.30265), (4, 3.18245), (10, 2.26216), (31, 2.04227)])
def test_few_prompts_widen_the_interval_as_students_t_does(groups: int, t95: float) -> None:
    """Tabulated 97.5 % quantiles of t with groups - 1 degrees of freedom."""
    values = np.arange(groups, dtype=float)
    interval = stats.cluster_robust(values, values.astype(int))
    assert (interval.hi - interval.mean) / (values.std(ddof=1) / math.sqrt(groups)) == pytest.approx(t95, rel=1e-5)


def test_bootstrap_is_seeded_and_unequal_prompts_are_weighted_by_tokens() -> None:
    values, labels = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    first = stats.cluster_bootstrap(values, labels, seed=3)
    assert first == stats.cluster_bootstrap(values, labels, seed=3)
    assert first.mean == 0.75 and (first.lo, first.hi) == (0.0, 1.0)
    lone = stats.cluster_robust([0.2, 0.4], ["a", "a"])
    assert lone.lo == -math.inf and lone.hi == math.inf


@pytest.mark.parametrize(
    ("call", "remedy"),
    [
        (lambda: stats.block_efficiency(1.2, 3), "in \\[0, 1\\]"),
        (lambda: stats.block_efficiency(0.5, -1), "use 0 for plain decoding"),
        (lambda: stats.predicted_speedup(0.5, 2, -0.1), "at least 0"),
        (lambda: stats.acceptance_by_position([3], [2]), "0 <= accepted <= length"),
        (lambda: stats.cluster_robust([], []), "non-empty"),
        (lambda: stats.cluster_robust([1.0, math.nan], ["a", "b"]), "drop the steps"),
        (lambda: stats.cluster_bootstrap([1.0], ["a"], confidence=95), "for example 0.95"),
    ],
)
def test_mistakes_name_their_remedy(call, remedy: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=remedy):
        call()


def test_survival_is_the_tail_of_the_length_law() -> None:
    accept = torch.rand(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mode in ("token", "block"):
        tails = torch.stack([length_law(row, mode).flip(0).cumsum(0).flip(0)[1:] for row in accept])
        torch.testing.assert_close(stats.survival(accept, mode), tails)


def test_equivalent_acceptance_accepts_as_many() -> None:
    for alpha in (0.0, 0.3, 0.9, 1.0):
        accepted = stats.block_efficiency(alpha, 4) - 1
        assert stats.equivalent_acceptance(accepted, [1, 1, 1, 1]) == pytest.approx(alpha, abs=1e-9)
    assert stats.equivalent_acceptance(0.5 + 0.25 * 0.25, [1, 0.25]) == pytest.approx(
        0.5
    )  # a quarter drafts two tokens
    assert math.isnan(stats.equivalent_acceptance(0.0, [0, 0]))


def test_speedup_from_costs_extends_the_predicted_one() -> None:
    tokens, c = stats.block_efficiency(0.6, 3), 0.1
    assert stats.speedup_from_costs(tokens, 3 * c * 2.0, 2.0, 2.0) == pytest.approx(stats.predicted_speedup(0.6, 3, c))
    assert stats.speedup_from_costs(2.0, 0.0, 4.0, 1.0) == 0.5  # verifying two tokens takes four plain steps


def test_ratio_of_rates() -> None:
    """Exact where every prompt has the same ratio; else an interval that covers as it says."""
    tokens, seconds = np.array([10.0, 20.0, 5.0]), np.array([1.0, 3.0, 0.5])
    same = stats.ratio_of_rates(tokens, seconds, tokens, 2 * seconds)
    assert (same.mean, same.lo, same.hi) == pytest.approx((2, 2, 2)) and same.clusters == 3
    lone = stats.ratio_of_rates([10], [1], [10], [2])
    assert (lone.mean, lone.lo, lone.hi) == (2, 0, math.inf)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = rng.integers(20, 60, 8).astype(float)
        quick, plain = (tokens * each * rng.lognormal(0, 0.2, 8) for each in (0.01, 0.02))
        found = stats.ratio_of_rates(tokens, quick, tokens, plain)
        covered += found.lo <= 2 <= found.hi
    assert 0.91 <= covered / 400 <= 0.98
    with pytest.raises(ValueError, match="one positive amount and time a prompt"):
        stats.ratio_of_rates([1, 2], [0, 0], [1, 2], [1, 2])
