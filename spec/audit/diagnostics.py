"""What explains a verdict but does not decide it: classical scores, histograms, and where a fault shows.

Scores are near N(0, 1) under H0 for many tokens; they are read once, at the end. Everything is kept as sums and counts,
so that an audit of live traffic can go on for ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spec.audit.scoring import Scored
from spec.params import Params

BINS = 32
_PAIR_BINS = 8
_GROUPS = 64  # settings told apart; live traffic may bring any number
_OTHER = "other settings"
_LARGE = 20  # tokens: smaller groups are not pointed at
_OFF = Params()


@dataclass
class Diagnostics:
    """Feed it :class:`Scored` batches."""

    pit: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    draft_pit: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    pairs: np.ndarray = field(default_factory=lambda: np.zeros(_PAIR_BINS**2, dtype=np.int64))
    impossible: int = 0
    _excess: float = 0.0  # sum of -log p(x) - H(p)
    _variance: float = 0.0
    _settings: set[str] = field(default_factory=set)
    # (what groups, its label) -> law -> [tokens, sum of the misfit]; law None: without one
    _groups: dict[tuple[str, str], dict[str | None, np.ndarray]] = field(default_factory=dict)

    def update(self, scored: Scored, params: Sequence[Params]) -> None:
        """``params``: of each sample that ``scored.sample`` points to."""
        if not len(scored.sample):
            return
        possible = ~scored.impossible
        self.pit += _counts(scored.pit * BINS, BINS)
        self.draft_pit += _counts(scored.draft_pit * BINS, BINS)
        self.pairs += _counts(_pairs(scored), _PAIR_BINS**2)
        self.impossible += int((~possible).sum())
        self._excess += float((-scored.log_p - scored.entropy)[possible].sum())
        self._variance += float(scored.spread[possible].sum())
        self._group(scored, params)

    def standard_tests(self) -> dict[str, float]:
        """``pit``, ``pit along the draft``: chi-square over 32 cells; ``pairs``: of successive PITs, 8 by 8 cells;
        ``surprise``: sum of -log p(x) - H(p) over its standard deviation. All as standard normal scores.
        """
        if not self.pit.sum() + self.impossible:
            return {}
        tests = {
            "pit": chi_square_score(self.pit),
            "pairs": chi_square_score(self.pairs),
            "surprise": self._excess / max(self._variance, 1e-12) ** 0.5,
            "impossible tokens": float(self.impossible),
        }
        if self.draft_pit.any():
            tests["pit along the draft"] = chi_square_score(self.draft_pit)
        return tests

    def histograms(self) -> dict[str, list[int]]:
        """Counts over 32 bins; empty where there is no PIT."""
        found = {"pit": self.pit, "pit along the draft": self.draft_pit}
        return {name: counts.tolist() if counts.any() else [] for name, counts in found.items()}

    def where(self, law: str | None) -> dict[str, Any]:
        """The request settings, and the position in the block, in which tokens fit the target least.

        By the mean gain of betting on ``law``; None: by how far the surprise is from what it should be. Groups below
        20 tokens are left out. KeyError for a law that no batch had.
        """
        means: dict[str, dict[str, float]] = defaultdict(dict)
        for (title, label), laws in self._groups.items():
            tokens, total = laws[None][0], laws.get(law, np.zeros(2))[1]
            if tokens >= _LARGE:
                means[title][label] = total / tokens
        if not any(law in laws for laws in self._groups.values()):
            raise KeyError(law)
        return {title: max(of, key=of.__getitem__) for title, of in means.items() if len(of) > 1}

    def _group(self, scored: Scored, params: Sequence[Params]) -> None:
        names = {i: self._label(setting(params[i])) for i in np.unique(scored.sample)}
        settings = np.array([names[i] for i in scored.sample])
        misfits = dict(_misfits(scored))
        for title, labels in (("setting", settings), ("position in block", scored.offset)):
            kinds, index = np.unique(labels, return_inverse=True)
            counts = np.bincount(index, minlength=len(kinds))
            for law, misfit in misfits.items():
                sums = np.bincount(index, weights=misfit, minlength=len(kinds))
                for kind, count, total in zip(kinds, counts, sums, strict=True):
                    if title == "setting" or kind >= 0:
                        group = self._groups.setdefault((title, str(kind)), {})
                        group[law] = group.get(law, np.zeros(2)) + np.array([count, total])

    def _label(self, name: str) -> str:
        if len(self._settings) < _GROUPS:
            self._settings.add(name)
        return name if name in self._settings else _OTHER


def _misfits(scored: Scored) -> Iterator[tuple[str | None, np.ndarray]]:
    """(law, [N] log-gain of mixing 10 % of it in); for None the squared deviation of the surprise."""
    out = scored.impossible
    excess = np.where(out, 3.0, -scored.log_p - scored.entropy)
    yield None, excess**2 - np.minimum(scored.spread, 1e3)
    yield IMPOSSIBLE, out.astype(float)
    for law, (log_ratio, _) in scored.ratios.items():
        yield law, np.where(out, 1.0, np.logaddexp(np.log(0.9), np.log(0.1) + log_ratio))


IMPOSSIBLE = "tokens the target cannot say"


def chi_square_score(found: np.ndarray) -> float:
    """Chi-square of counts over equally likely cells as a standard normal score."""
    total = int(found.sum())
    if not total:
        return 0.0
    due = total / len(found)
    return wilson_hilferty(float(((found - due) ** 2).sum() / due), len(found) - 1)


def wilson_hilferty(statistic: float, freedom: int) -> float:
    """A chi-square statistic as a standard normal score (1931)."""
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def setting(params: Params) -> str:
    """What differs from the defaults, seed aside."""
    parts = [
        f"{name}={getattr(params, name)}"
        for name in params.__dataclass_fields__
        if name != "seed" and getattr(params, name) != getattr(_OFF, name)
    ]
    return " ".join(parts) or "defaults"


def _counts(cells: np.ndarray, count: int) -> np.ndarray:
    """[count] of cells in [0, count), NaN left out."""
    known = cells[~np.isnan(cells)]
    return np.bincount(known.astype(int).clip(0, count - 1), minlength=count)


def _pairs(batch: Scored) -> np.ndarray:
    """Cells of successive PITs within samples."""
    u = batch.pit
    follows = (batch.position[1:] > 0) & ~np.isnan(u[1:]) & ~np.isnan(u[:-1])
    return (np.floor(_PAIR_BINS * u[:-1]) * _PAIR_BINS + np.floor(_PAIR_BINS * u[1:]))[follows]
