"""How large a fault can still be: an upper confidence bound on shifts of mass, valid at every number of tokens.

For a declared set A_t, a function of the prefix, let Delta_t = r_t(A_t) - p_t(A_t) be the mass the engine's law r_t has
there beyond the target's. |Delta_t| <= TV(r_t, p_t), with equality where A_t is the set on which r_t exceeds p_t: for a
draft leak (1 - eps) p + eps q that is {q > p}, for a slightly wrong temperature {-log p > H}, for a dropped
truncation the tokens outside the support. The certificate bounds the *mean* of Delta_t over the audited tokens, for
every declared direction at once:

    with probability at least 1 - delta, for all n:  |mean_{t<=n} Delta_t| <= epsilon_n

By the empirical-Bernstein supermartingale of Howard et al. (2021, Ann. Statist. 49(2), Thm 4; Fan et al. 2015): with
X_t = 1{x_t in A_t} - p_t(A_t) >= -1, exp(l sum (X_t - Delta_t) - psi(l) sum X_t^2) with psi(l) = -log(1 - l) - l,
0 <= l < 1, has mean at most 1 (predicting X_t by 0), and so with -X_t; mixed over a grid of l, and inverted.

What it cannot see: shifts along sets that were not declared; shifts that cancel between contexts (rounding is such a
shift: see spec.audit.floor); dependence between tokens; prompts and parameters that were not asked. The e-process
(:mod:`spec.audit.evidence`) sees some of these, without a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from spec.audit.scoring import Scored

_RATES = 0.7 * 0.5 ** np.arange(8)  # l; small ones for large samples
_PSI = -np.log1p(-_RATES) - _RATES
MAX_DIRECTIONS = 4  # over which delta is divided; more would need another division


@dataclass
class Direction:
    """Sums of one set."""

    tokens: int = 0
    total: float = 0.0  # of X_t
    squares: float = 0.0  # of X_t^2
    expected: float = 0.0  # of p_t(A_t)

    @property
    def shift(self) -> float:
        """Estimate of the mean of Delta_t."""
        return self.total / max(self.tokens, 1)

    def radius(self, delta: float) -> float:
        """Half-width of the two-sided confidence sequence at level ``delta``; infinite without tokens."""
        if not self.tokens:
            return math.inf
        return excess(self.squares, delta / 2) / self.tokens


def excess(squares: float, delta: float) -> float:
    """The s with mean_l exp(l s - psi(l) V) = 1/delta, V = ``squares``: what sum (X_t - Delta_t) ever stays below."""
    high = min((math.log(len(_RATES) / delta) + psi * squares) / rate for rate, psi in zip(_RATES, _PSI, strict=True))
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        value = np.logaddexp.reduce(_RATES * middle - _PSI * squares) - math.log(len(_RATES))
        low, high = (middle, high) if value < -math.log(delta) else (low, middle)
    return high


@dataclass
class Certificate:
    """Feed it :class:`Scored` batches."""

    delta: float
    directions: dict[str, Direction] = field(default_factory=dict)

    def update(self, scored: Scored) -> None:
        """Every direction of ``scored``, and the tokens outside the support."""
        out = scored.impossible.astype(float)
        sets = {**scored.directions, "tokens the target cannot say": (out, np.zeros(len(out)))}
        for name, (hit, expected) in sets.items():
            direction = self.directions.setdefault(name, Direction())
            x = hit - expected
            direction.tokens += len(x)
            direction.total += float(x.sum())
            direction.squares += float((x * x).sum())
            direction.expected += float(expected.sum())
        assert len(self.directions) <= MAX_DIRECTIONS

    @property
    def epsilon(self) -> float:
        """The bound over all directions; 1 before anything is known."""
        bounds = [abs(d.shift) + d.radius(self.delta / MAX_DIRECTIONS) for d in self.directions.values()]
        return min(1.0, max(bounds, default=1.0))

    def table(self) -> dict[str, dict[str, float]]:
        """Of each direction: expected mass, estimated shift, bound on its absolute value."""
        return {
            name: {
                "expected": d.expected / max(d.tokens, 1),
                "shift": d.shift,
                "bound": min(1.0, abs(d.shift) + d.radius(self.delta / MAX_DIRECTIONS)),
            }
            for name, d in self.directions.items()
        }
