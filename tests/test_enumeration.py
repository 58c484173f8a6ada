"""Estimators against exact sums over everything a toy language model can say (float64, to 1e-10)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy.losses import names, per_token
from onpolicy.losses.__main__ import IN_README, Measured, documents
from onpolicy.losses.proofs import cases
from onpolicy.losses.proofs.facts import Facts
from onpolicy.losses.proofs.truncation import truncation_rows
from onpolicy.losses.proofs.values import control_rows, value_rows, variances
from onpolicy.losses.proofs.worlds import Row, World, estimated, measure, per_sequence
from onpolicy.losses.toy import Steps, Tree, brute_force, gradient, returns, score_gradient, sequence_kl, token_kl

EXACT = 1e-10
UNBIASED = {
    "k1 in reward",
    "k2 in loss",
    "k1 in loss, times S/stop(S)",
    "k3 in loss, times S/stop(S)",
    "discount 1",
    "discount 1, later rewards in closed form",
    "extrapolation 1.5 from reference R",
    "two teachers, weights 0.7 and 0.3",
    "task reward to every token, discount 0",
    "task reward to the last token, discount 1",
    "ρ of the prefix up to the token",
    "ρ of the sequence",
    "ρ of the sequence, discount 1",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a few hundred numbers: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[(2, 3, 1), (3, 3, 0), (4, 2, 2)], ids=str)
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return [measure(case) for case in cases.all_cases(World.make(*request.param))]


def test_every_gradient_is_what_it_is_proved_to_be(rows: list[Row]) -> None:
    assert len(rows) > 40
    assert {row.name: row.error for row in rows if not row.error < EXACT} == {}


def test_unbiased_with_every_control_variate_and_biased_without_exception(rows: list[Row]) -> None:
    """Each estimator in exactly one of two classes, so that a bias that comes or goes is noticed."""
    rows = [row for row in rows if not row.idea.startswith("full vocabulary")]
    unbiased = {row.name for row in rows if all(bias < EXACT for bias in row.bias.values())}
    biased = {row.name for row in rows if row.bias["none"] > 1e-3}
    assert unbiased == UNBIASED
    assert biased == {row.name for row in rows} - UNBIASED


def test_gkd_descends_the_divergence_at_fixed_prefixes_only(rows: list[Row]) -> None:
    biases = {row.claims: row.bias["none"] for row in rows if row.idea.startswith("full vocabulary")}
    assert biases.pop(cases.FIXED) < EXACT
    assert len(biases) == 5 and min(biases.values()) > 1e-3


def test_largest_vocabulary() -> None:
    """V = 8, length 3: 400 sequences; batches of two would be 160,000 and are left to the smaller worlds."""
    facts = Facts(World.make(8, 3, 3))
    groups = (cases.placements, cases.credits, cases.rewards, cases.corrections, cases.normalisations)
    errors = {case.name: measure(case).error for group in groups for case in group(facts)}
    assert len(errors) > 30
    assert {name: error for name, error in errors.items() if not error < EXACT} == {}


@pytest.mark.parametrize("world", [(3, 3, 0), (4, 3, 1), (8, 2, 2)], ids=str)
def test_values(world: tuple[int, int, int]) -> None:
    measured = {row.name: row for row in value_rows(World.make(*world))}
    assert max(row.error for row in measured.values()) < EXACT
    biased = {name for name, row in measured.items() if row.bias > 1e-3}
    assert biased == {"k2", "k1, drawn from Q", "k1, drawn from Q, times ρ of the token"}
    assert measured["KL(S‖T) in closed form at each prefix"].variance < measured["k1"].variance


def test_one_token_by_hand() -> None:
    """S = (1/2, 1/2), T = (1/4, 3/4), one token: KL(S‖T) = log 2 - log 3 / 2 and d/dlogit = ±log 3 / 4."""
    world = World.make(2, 1)
    student, teacher = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    facts = Facts(World(**(vars(world) | {"student": student, "teacher": teacher})))
    assert float(sequence_kl(world.tree, student, teacher)) == pytest.approx(math.log(2) - math.log(3) / 2, abs=1e-15)
    expected = torch.tensor([[math.log(3) / 4, -math.log(3) / 4]], dtype=torch.float64)
    torch.testing.assert_close(facts.fixed, expected)
    mean = estimated(facts.world, "none", sampler=student).mean(0)  # the two tokens are equally likely
    torch.testing.assert_close(mean, expected)


# --- the oracle itself ---


def test_tree_lists_every_sequence_once() -> None:
    tree = Tree.grow(3, 3)
    assert len(set(tree.sequences)) == len(tree.sequences) == 1 + 2 + 4 + 8
    assert tree.finished.sum() == 7
    assert float(tree.sequence_probabilities(tree.table(0)).sum()) == pytest.approx(1, abs=1e-14)


def test_oracle_agrees_with_itself() -> None:
    """Prefix sums against sequence sums (chain rule of KL), autograd against differences, recursion against a loop."""
    tree = Tree.grow(3, 3)
    student, teacher = tree.table(0), tree.table(1)
    by_prefix = (tree.visits(student) * token_kl(student, teacher)).sum()
    torch.testing.assert_close(sequence_kl(tree, student, teacher), by_prefix, rtol=0, atol=1e-14)

    slope = gradient(lambda logits: sequence_kl(tree, logits, teacher), student)
    bump = torch.zeros_like(student)
    bump[2, 1] = 1e-6
    difference = sequence_kl(tree, student + bump, teacher) - sequence_kl(tree, student - bump, teacher)
    assert float(difference) / 2e-6 == pytest.approx(float(slope[2, 1]), rel=1e-7)

    reward = tree.table(2)

    def to_go(steps: Steps, t: int) -> float:
        return sum(0.5 ** (k - t) * float(reward[step]) for k, step in enumerate(steps) if k >= t)

    recursion = returns(tree, student, reward, 0.5)
    weighted = tree.visits(student)[:, None] * student.softmax(-1) * recursion
    torch.testing.assert_close(
        brute_force(tree, student, student, to_go), score_gradient(weighted, student), rtol=0, atol=1e-14
    )


# --- what needs more than one row ---


@pytest.mark.parametrize("name", [name for name in names() if name != "kd"])  # kd is no function of the prefix alone
def test_gkd_lacks_exactly_the_prefixes_gradient(name: str) -> None:
    """At sampled prefixes a divergence D gives Σ_h d(h) ∇D(h); what the sequence-level gradient has beyond that is
    E Σ_t (Σ_{k>t} D(h_k)) ∇log S(y_t|h_t): credit for the divergence met later. Together they are exact."""
    facts = Facts(World.make(4, 3, 7))
    tree, student, teacher = facts.tree, facts.student, facts.teacher
    samples = per_sequence(tree, student, lambda x: per_token(name, x, teacher[tree.states]).sum())
    sampled = torch.einsum("b,bpv->pv", tree.sequence_probabilities(student), samples)
    full = facts.differentiated(lambda logits: per_token(name, logits, teacher))
    values = per_token(name, student, teacher).tolist()

    def later(steps: Steps, t: int) -> float:
        return sum(values[state] for state, _ in steps[t + 1 :])

    missing = brute_force(tree, student, student, later)
    assert missing.norm() > 1e-3 * full.norm()
    torch.testing.assert_close(sampled + missing, full, rtol=0, atol=EXACT)


@pytest.mark.parametrize("extrapolation", [0.5, 1.25, 2.0])
def test_extrapolations_optimum_is_the_geometric_extrapolation(extrapolation: float) -> None:
    """At S ∝ R (T/R)^λ the expected gradient is zero, and nowhere near it at S = T."""
    world = World.make(3, 3, 4)
    teacher, reference = world.teacher.log_softmax(-1), world.reference.log_softmax(-1)
    optimum = reference + extrapolation * (teacher - reference)

    def expected_gradient(student: torch.Tensor) -> torch.Tensor:
        moved = World(**(vars(world) | {"student": student}))
        samples = estimated(moved, "none", sampler=student, extrapolation=extrapolation)
        return torch.einsum("b,bpv->pv", world.tree.sequence_probabilities(student), samples)

    assert float(expected_gradient(optimum).norm()) < EXACT
    assert float(expected_gradient(teacher).norm()) > 1e-2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 6), distance=st.floats(0.01, 4))
def test_best_baseline_never_adds_variance(seed: int, spread: float, distance: float) -> None:
    variance = variances(World.make(5, 2, seed, spread, distance))
    slack = 1e-9 * variance["none"]
    assert variance["best"] <= variance["none"] + slack
    assert variance["best"] <= variance["-KL"] + slack


def test_minus_kl_helps_the_unsure_and_can_hurt_the_sure() -> None:
    rows = {(row.spread, row.distance): row for row in control_rows(worlds=10)}
    assert rows[1.0, 2.0].variance["-KL"] < 0.9
    assert rows[3.0, 1.0].lowered["-KL"] < 0.6
    assert all(row.lowered["best"] == 1 for row in rows.values())


def test_what_is_generated_in_the_documents_is_true() -> None:
    """Regenerate with: python -m onpolicy.losses --write"""
    measured = Measured.of(World.make())
    assert {row.name for row in measured.estimators} >= set(IN_README)
    for path, text in documents(measured).items():
        assert path.read_text(encoding="utf-8") == text, path.name


def test_a_readme_without_its_markers_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md needs one line '<!-- begin"):
        documents(Measured([], [], [], []), tmp_path)


# --- truncated divergences ---

MIXTURES = {"adaptive_kl", "lk_hybrid"}  # their weights depend on the distributions: no f-divergences


@pytest.mark.parametrize("seed", [0, 1])
def test_truncated_values_and_gradients(seed: int) -> None:
    rows = {row.name: row for row in truncation_rows(World.make(8, 2, seed), (1, 2, 4, 8))}
    assert set(rows) == set(names()) - {"kd"}
    assert {row.name: row.error for row in rows.values() if not row.error < EXACT} == {}
    for name, row in rows.items():
        assert abs(row.value[8]) < EXACT and row.gradient[8] < EXACT
        assert min(row.gradient[k] for k in (1, 2, 4)) > 1e-3
        if name not in MIXTURES:  # coarser never tells two distributions better apart
            assert -1 < row.value[1] <= row.value[2] <= row.value[4] < 0
