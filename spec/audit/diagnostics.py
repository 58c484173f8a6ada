"""What explains a verdict but does not decide it: classical scores, histograms, and where a fault shows.

Scores are near N(0, 1) under H0 for many tokens; they are read once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from spec.audit.scoring import Scored
from spec.params import Params

BINS = 32
_OFF = Params()


def standard_tests(batches: Sequence[Scored]) -> dict[str, float]:
    """``pit``, ``pit along the draft``: chi-square over 32 cells; ``pairs``: of successive PITs, 8 by 8 cells;
    ``surprise``: sum of -log p(x) - H(p) over its standard deviation. All as standard normal scores.
    """
    if not batches or not sum(len(b.pit) for b in batches):
        return {}
    pit, draft = (np.concatenate([getattr(b, name) for b in batches]) for name in ("pit", "draft_pit"))
    pairs = np.concatenate([_pairs(b) for b in batches])
    possible = [~b.impossible for b in batches]
    excess = sum(float((-b.log_p - b.entropy)[ok].sum()) for b, ok in zip(batches, possible, strict=True))
    variance = sum(float(b.spread[ok].sum()) for b, ok in zip(batches, possible, strict=True))
    tests = {
        "pit": chi_square_score(pit[~np.isnan(pit)] * BINS, BINS),
        "pairs": chi_square_score(pairs, 64),
        "surprise": excess / max(variance, 1e-12) ** 0.5,
        "impossible tokens": float(sum((~ok).sum() for ok in possible)),
    }
    if not np.isnan(draft).all():
        tests["pit along the draft"] = chi_square_score(draft[~np.isnan(draft)] * BINS, BINS)
    return tests


def chi_square_score(cells: np.ndarray, count: int) -> float:
    """Chi-square of equally likely ``cells`` in [0, count) as a standard normal score."""
    if not len(cells):
        return 0.0
    found = np.bincount(cells.astype(int).clip(0, count - 1), minlength=count)
    statistic = float(((found - len(cells) / count) ** 2).sum() / (len(cells) / count))
    return wilson_hilferty(statistic, count - 1)


def wilson_hilferty(statistic: float, freedom: int) -> float:
    """A chi-square statistic as a standard normal score (1931)."""
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def histogram(pit: np.ndarray) -> list[int]:
    """Counts over 32 bins; empty where there is no PIT."""
    known = pit[~np.isnan(pit)]
    return [] if not len(known) else np.bincount((known * BINS).astype(int).clip(0, BINS - 1), minlength=BINS).tolist()


def where(batches: Sequence[Scored], params: Sequence[Params], law: str | None) -> dict[str, Any]:
    """The request settings, and the position in the block, in which tokens fit the target least.

    By the mean gain of betting on ``law`` where it is one, else by the shape of the PIT. Groups below 20 tokens are
    left out.
    """
    score = np.concatenate([_misfit(b, law) for b in batches])
    offsets = np.concatenate([b.offset for b in batches])
    names = np.array([setting(p) for p in params])
    found: dict[str, Any] = {}
    for title, groups in (("setting", names), ("position in block", offsets)):
        labels = [label for label in np.unique(groups) if title == "setting" or label >= 0]
        large = [label for label in labels if (groups == label).sum() >= 20]
        means = {str(label): float(score[groups == label].mean()) for label in large}
        if len(means) > 1:
            found[title] = max(means, key=lambda label: means[label])
    return found


def setting(params: Params) -> str:
    """What differs from the defaults, seed aside."""
    parts = [
        f"{name}={getattr(params, name)}"
        for name in params.__dataclass_fields__
        if name != "seed" and getattr(params, name) != getattr(_OFF, name)
    ]
    return " ".join(parts) or "defaults"


def _misfit(batch: Scored, law: str | None) -> np.ndarray:
    """[N] log-gain of mixing 10 % of the law in; without one, squared deviation of the surprise."""
    if law is not None and law in batch.ratios:
        with np.errstate(over="ignore"):
            return np.where(batch.impossible, 1.0, np.log(0.9 + 0.1 * np.exp(batch.ratios[law][0])))
    excess = np.where(batch.impossible, 3.0, -batch.log_p - batch.entropy)
    return excess**2 - np.minimum(batch.spread, 1e3)


def _pairs(batch: Scored) -> np.ndarray:
    """Cells of successive PITs within samples."""
    u = batch.pit
    follows = (batch.position[1:] > 0) & ~np.isnan(u[1:]) & ~np.isnan(u[:-1])
    return (np.floor(8 * u[:-1]) * 8 + np.floor(8 * u[1:]))[follows]
