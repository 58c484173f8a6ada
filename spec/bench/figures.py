"""Means and intervals of what was counted and what was expected. Pure functions; prompts are the clusters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from spec import stats
from spec.bench.costs import Costs
from spec.bench.counting import Text
from spec.bench.plan import Served
from spec.bench.replay import Expected, Trial
from spec.stats import Interval


@dataclass(frozen=True)
class ExpectedRow:
    """From full distributions, for one way of drafting and verifying.

    ``acceptance`` is of a drafted token: sum min(p, q) (probabilistic) or p(argmax q) (greedy) at every prefix of the
    texts; for block verification, which accepts no token by itself, the constant rate that token-wise verification
    would need to accept as many (:func:`spec.stats.equivalent_acceptance`). The others are at the prefixes where the
    run's steps began.
    """

    acceptance: Interval
    tokens_per_step: Interval
    unconditional: list[float]  # [K] of drafts that reach position i, the share that keeps it; NaN where none does
    conditional: list[float]  # [K] of those that keep position i - 1
    positions: int  # tokens of the texts with a draft
    steps: int


@dataclass(frozen=True)
class CountedRow:
    """What the engine did."""

    tokens_per_step: Interval
    unconditional: list[Interval | None]  # [K]
    conditional: list[Interval | None]
    steps: int


def expected_row(texts: Sequence[Expected], served: Served, drafter: str, length: int) -> ExpectedRow | None:
    """None where nothing was proposed, or tried. ``drafter``: whose trials; ``length``: K."""
    rates = [text.argmax if served == "greedy" else text.overlap for text in texts]
    values, labels = _clustered(rates, texts)
    drafted = np.isfinite(values)
    tokens = [(trial.tokens(served, length), text.text.index) for text in texts for trial in text.trials[drafter]]
    if not drafted.any() or not tokens:
        return None
    survivals, owners = _survivals(texts, served, drafter, length)
    per_step = _interval([t for t, _ in tokens], [owner for _, owner in tokens], 1, length + 1)
    unconditional, conditional = _by_position(survivals, length)
    if served == "block":
        acceptance = _equivalent(survivals, owners, length)
    else:
        acceptance = _interval(values[drafted], labels[drafted], 0, 1)
    return ExpectedRow(acceptance, per_step, unconditional, conditional, int(drafted.sum()), len(tokens))


def counted_row(texts: Sequence[Text], length: int) -> CountedRow:
    """Of every step the engine made, drafts or none."""
    steps = [(step, text.index) for text in texts for step in text.steps]
    labels = np.array([owner for _, owner in steps])
    accepted = np.array([step.accepted for step, _ in steps])
    drafted = np.array([step.drafted for step, _ in steps])

    def share(passed: np.ndarray, among: np.ndarray) -> Interval | None:
        return _interval(passed[among].astype(float), labels[among], 0, 1) if among.any() else None

    positions = range(1, length + 1)
    return CountedRow(
        _interval([step.tokens for step, _ in steps], labels, 1, length + 1),
        [share(accepted >= i, drafted >= i) for i in positions],
        [share(accepted >= i, (drafted >= i) & (accepted >= i - 1)) for i in positions],
        len(steps),
    )


def disagreement(texts: Sequence[Expected], served: Served, drafter: str, length: int) -> Interval:
    """Counted less expected tokens, a step at a time: its interval holds 0 where prediction and engine agree."""
    differences, labels = [], []
    for text in texts:
        counted = {step.start: step.tokens for step in text.text.steps}
        for trial in text.trials[drafter]:
            differences.append(counted[trial.start] - trial.tokens(served, length))
            labels.append(text.text.index)
    return stats.cluster_robust(differences, labels)


def speedup_curve(texts: Sequence[Expected], served: Served, drafter: str, costs: Costs) -> list[tuple[float, float]]:
    """(tokens a step, speed-up) for draft lengths 0..L.

    The prefixes are those where the steps of the run began; with another draft length a step would begin at somewhat
    others.
    """
    trials = [trial for text in texts for trial in text.trials[drafter]]
    curve = []
    for length, (draft, verify) in enumerate(zip(costs.draft, costs.target, strict=True)):
        tokens = float(np.mean([trial.tokens(served, length) for trial in trials]))
        curve.append((tokens, stats.speedup_from_costs(tokens, draft, verify, costs.target[0])))
    return curve


def best_length(curves: Sequence[Sequence[tuple[float, float]]]) -> int:
    """The draft length with the highest speed-up, geometric mean over the curves; the shortest of equals."""
    logs = np.mean([[math.log(speedup) for _, speedup in curve] for curve in curves], axis=0)
    return int(np.argmax(logs))


def _clustered(values: Sequence[np.ndarray], texts: Sequence[Expected]) -> tuple[np.ndarray, np.ndarray]:
    labels = [np.full(len(part), text.text.index) for part, text in zip(values, texts, strict=True)]
    return np.concatenate(values), np.concatenate(labels)


def _survivals(
    texts: Sequence[Expected], served: Served, drafter: str, length: int
) -> tuple[list[np.ndarray], list[int]]:
    pairs: list[tuple[Trial, int]] = [(trial, text.text.index) for text in texts for trial in text.trials[drafter]]
    return [trial.survival(served, length) for trial, _ in pairs], [owner for _, owner in pairs]


def _by_position(survivals: Sequence[np.ndarray], length: int) -> tuple[list[float], list[float]]:
    unconditional, conditional = [], []
    for i in range(length):
        here = [survival for survival in survivals if len(survival) > i]
        kept = sum(float(survival[i]) for survival in here)
        before = sum(float(survival[i - 1]) if i else 1.0 for survival in here)
        unconditional.append(kept / len(here) if here else math.nan)
        conditional.append(kept / before if before else math.nan)
    return unconditional, conditional


def _equivalent(survivals: Sequence[np.ndarray], owners: Sequence[int], length: int) -> Interval:
    """The rate whose accepted length is the mean, and those of the mean's limits."""
    shares = [float(np.mean([len(survival) > i for survival in survivals])) for i in range(length)]
    accepted = _interval([float(survival.sum()) for survival in survivals], owners, 0, length)
    rate, low, high = (
        stats.equivalent_acceptance(value, shares) for value in (accepted.mean, accepted.lo, accepted.hi)
    )
    return Interval(rate, low, high, accepted.clusters)


def _interval(
    values: Sequence[float] | np.ndarray, labels: Sequence[int] | np.ndarray, low: float, high: float
) -> Interval:
    """Closed form, cut to the range of the values: with one prompt it is the whole range."""
    found = stats.cluster_robust(values, labels)
    return Interval(found.mean, max(found.lo, low), min(found.hi, high), found.clusters)
