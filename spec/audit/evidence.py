"""An e-process against "every token is drawn from the target's law": bets on named faults and on shapes of the PIT.

Each bet multiplies a capital by factors with mean at most 1 under H0 given everything before, and the capitals are
averaged with fixed weights; by Ville's inequality the average ever reaches 1/delta with probability at most delta,
whenever one looks and whyever one stops.

- *Named*: (1 - eps) p + eps m against p, over a grid of eps, for every law m of :mod:`spec.audit.laws`.
- *Shapes*: the PIT (and differences of PITs that are uniform under H0) puts d more mass than its width into a dyadic
  interval, over all intervals of five levels and a grid of d. These need no guess of what is wrong.

Tokens the target cannot say: with tolerance eta the null is widened to laws that put, at *every* token, up to eta mass
outside the target's support S, and keep p's proportions within it. A bet that puts o > eta outside is then paid
(1 - o)/(1 - eta) a token inside and o/eta outside; one that puts less there is not paid for them. For eta = 0 a single
such token decides. (Rounding puts more there on the few rows where a token is at the edge of top-p, and nothing on
others. Where a bet does not know those rows it suffices that the mean is below eta; for one that bets on some settings
alone, eta must be above the mean of the worst setting.)

Validity needs that requests are answered independently given their prompts, which is what H0 says, and looks are taken
at ends of samples. Shape legend: N tokens, J bets, T ends of samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from spec.audit.diagnostics import IMPOSSIBLE
from spec.audit.scoring import Scored

SHARES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.9)  # eps of a mixture with a named law
BUMPS = (0.003, 0.01, 0.03, 0.1, 0.3)  # d, either sign
_LEVELS = 5  # intervals of width 1/2 .. 1/32
_CERTAIN = 60.0  # nats paid for a token that is impossible under H0: beyond any delta in use
_UNNAMED = -8.0  # log-probability of such a token when nothing is said of which: a named law that does better is named


@dataclass(frozen=True)
class Bets:
    """Of one family, on one batch."""

    parameters: list[float]  # [J]
    gains: np.ndarray  # log-gains [J, N] a token, or [J, T] a sample
    # The same of betting on p against a share of m, given that the token is one the target can say: [J, N]
    against: np.ndarray | None = None
    distance: float = 0.0  # sum over tokens of an estimate of TV(m, p)


@dataclass
class Capital:
    """Log-capitals of the bets of one family."""

    parameters: list[float]
    logs: np.ndarray  # [J]
    against: np.ndarray  # [J] of the bets against a share
    against_highest: np.ndarray  # [J] their largest at a look
    distance: float = 0.0

    @property
    def log_mean(self) -> float:
        return _log_mean(self.logs[:, None])[0].item()

    @property
    def best(self) -> float:
        """The parameter whose bet won most."""
        return self.parameters[int(self.logs.argmax())]

    def excluded(self, level: float) -> float | None:
        """The smallest share, of those from the largest down without a gap, whose bet against it reached ``level``."""
        smallest = None
        for share, high in sorted(zip(self.parameters, self.against_highest, strict=True), reverse=True):
            if high < level:
                break
            smallest = share
        return smallest


@dataclass(frozen=True)
class Look:
    """The e-process at the end of a sample."""

    tokens: int
    log_e: float


@dataclass
class Evidence:
    """Feed it :class:`Scored` batches; families with names of their own, half the weight on named, half on shapes."""

    tolerance: float = 0.0  # eta
    level: float = math.inf  # log e at which the null is given up: log(1/delta)
    tokens: int = 0
    named: dict[str, Capital] = field(default_factory=dict)
    shapes: dict[str, Capital] = field(default_factory=dict)
    log_e: float = 0.0  # now
    highest: float = 0.0  # the largest log e there was: what Ville's inequality speaks of
    reached: int | None = None  # tokens when log e first was at ``level``
    _path: list[Look] = field(default_factory=lambda: [Look(0, 0.0)])
    _stride: int = 1  # looks between two that are kept
    _looks: int = 0
    _last_sample: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def path(self) -> list[Look]:
        """The first look, the newest, and evenly many between: all of them as long as they are few."""
        newest = Look(self.tokens, self.log_e)
        return self._path if self._path[-1] == newest else [*self._path, newest]

    def update(self, scored: Scored) -> None:
        """Bets on a batch. A law or shape that is new here starts with capital 1: bets may begin at any time."""
        if not len(scored.sample):
            return
        ends = np.flatnonzero(np.diff(scored.sample, append=-1))  # [T] last token of each sample
        named = self._settle(self.named, dict(_named_bets(scored, self.tolerance)), ends)
        streams = dict(_streams(scored, self._last_sample))
        shapes = self._settle(self.shapes, {name: _shape_bets(u, ends) for name, u in streams.items()}, None)
        log_e = np.logaddexp(named, shapes) - math.log(2)
        for end, e in zip(ends, log_e, strict=True):
            self._look(Look(self.tokens + int(end) + 1, float(e)))
        self.tokens += len(scored.sample)
        last = scored.sample == scored.sample[-1]
        self._last_sample = scored.pit[last]

    def _look(self, look: Look) -> None:
        self.log_e, self.highest = look.log_e, max(self.highest, look.log_e)
        if self.reached is None and look.log_e >= self.level:
            self.reached = look.tokens
        self._looks += 1
        if self._looks % self._stride == 0:
            self._path.append(look)
        if len(self._path) > _LOOKS:
            self._path, self._stride = self._path[::2], 2 * self._stride

    def shown(self) -> list[str]:
        """Named laws whose bets alone, at their weight, bring the whole to ``level``; the best first."""
        needed = self.level + math.log(2 * _FAMILIES)
        found = [(capital.log_mean, name) for name, capital in self.named.items() if capital.log_mean >= needed]
        return [name for _, name in sorted(found, reverse=True)]

    def excluded(self, delta: float) -> dict[str, dict[str, float]]:
        """Law m -> ``share``: with probability at least 1 - delta, for all laws and at all looks, the engine does not
        draw that share or more of its tokens from m and the rest from p; ``distance``: the total variation of it.

        Under a share s' >= s of m the bet for p against s has mean at most 1: with t = m/p its mean is
        1 + (s' - s) E_p[(t - 1) / (1 - s + s t)], and that function of t is concave and 0 at E_p[t] = 1. Tokens outside
        S are passed over, which conditions on S and leaves room for rounding. From the largest share down, each test is
        made only if all before it rejected, so that a law's level need not be divided; laws share ``delta``. The mean
        of TV(m, p) = E_p[max(1 - t, 0)] is estimated from the same tokens.
        """
        level, found = math.log(_FAMILIES / delta), {}
        for name, capital in self.named.items():
            share = None if name == "temperature" else capital.excluded(level)  # there parameters are no shares
            if share is not None:
                found[name] = {"share": share, "distance": share * capital.distance / max(self.tokens, 1)}
        return found

    def _settle(self, families: dict[str, Capital], bets: dict[str, Bets], ends: np.ndarray | None) -> np.ndarray:
        """Adds the gains of a batch to ``families``; the log of their mean capital at each end, [T].

        ``ends`` None: gains are a sample's already. Weights are split over all families there can be, so that one which
        appears late takes from none.
        """
        totals: dict[str, np.ndarray] = {}
        for name, bet in bets.items():
            count = len(bet.parameters)
            new = Capital(bet.parameters, np.zeros(count), np.zeros(count), np.zeros(count))
            capital = families.setdefault(name, new)
            steps = np.cumsum(bet.gains, axis=1)
            path = capital.logs[:, None] + (steps if ends is None else steps[:, ends])
            capital.logs = path[:, -1]
            capital.distance += bet.distance
            totals[name] = _log_mean(path)
            if bet.against is not None:
                steps = capital.against[:, None] + np.cumsum(bet.against, axis=1)[:, ends]
                capital.against = steps[:, -1]
                capital.against_highest = np.maximum(capital.against_highest, steps.max(1))
        idle = [np.full_like(next(iter(totals.values())), f.log_mean) for n, f in families.items() if n not in totals]
        means = [*totals.values(), *idle]
        spare = max(_FAMILIES - len(means), 0)  # not in use so far: capital 1 each
        assert len(means) <= _FAMILIES
        stacked = np.stack([*means, np.full_like(means[0], math.log(spare) if spare else -math.inf)])
        return np.logaddexp.reduce(stacked, axis=0) - math.log(_FAMILIES)


_LOOKS = 1024  # kept of the path
_FAMILIES = 24  # at most, of named laws and of shapes


def _named_bets(scored: Scored, eta: float) -> Iterator[tuple[str, Bets]]:
    """All temperatures are one family, with the factor as parameter."""
    out = scored.impossible
    temperatures: list[tuple[float, np.ndarray]] = []
    for name, (log_ratio, outside) in scored.ratios.items():
        if name.startswith("temperature x"):
            temperatures.append((float(name.removeprefix("temperature x")), np.where(out, 0.0, log_ratio)))
            continue
        gains = np.stack([_gains(share, log_ratio, outside, out, eta) for share in SHARES])
        against = np.stack([_against(share, log_ratio, outside, out) for share in SHARES])
        distance = float(np.maximum(-np.expm1(np.minimum(log_ratio, 0.0)), 0.0)[~out].sum())
        yield name, Bets([*SHARES], gains, against, distance)
    yield "temperature", Bets([f for f, _ in temperatures], np.stack([gain for _, gain in temperatures]))
    anything = np.where(out, _UNNAMED, -np.inf)
    everything = [_gains(share, anything, np.ones(len(out)), out, eta) for share in BUMPS]
    yield IMPOSSIBLE, Bets([*BUMPS], np.stack(everything))


def _mixed(share: float, log_ratio: np.ndarray) -> np.ndarray:
    """log of ((1 - share) p + share m) / p."""
    return np.logaddexp(math.log1p(-share), math.log(share) + log_ratio)


def _gains(share: float, log_ratio: np.ndarray, outside: np.ndarray, out: np.ndarray, eta: float) -> np.ndarray:
    """[N] log-gains of betting on (1 - share) p + share m; see the module's text for tokens outside S."""
    o = share * outside
    inside = _mixed(share, log_ratio) - np.log1p(-np.minimum(o, eta))
    if eta > 0:
        paid = np.log(np.maximum(o, eta) / eta)
    else:  # whatever is paid for what cannot happen: the more, the better m explains it
        paid = np.maximum(_CERTAIN + math.log(share) + log_ratio, 0.0)
    return np.where(out, np.where((o > eta) & (log_ratio > -np.inf), paid, 0.0), inside)


def _against(share: float, log_ratio: np.ndarray, outside: np.ndarray, out: np.ndarray) -> np.ndarray:
    """[N] log-gains of betting on p against (1 - share) p + share m, both given S; see :meth:`Evidence.excluded`."""
    return np.where(out, 0.0, np.log1p(-share * np.minimum(outside, 1.0)) - _mixed(share, log_ratio))


def _streams(scored: Scored, before: np.ndarray) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """(name, (u [N] uniform and independent of the past under H0, sample index [N])); NaN: no bet on this token."""
    u, sample = scored.pit, scored.sample
    yield "shape", (u, sample)
    if not np.isnan(scored.draft_pit).all():
        yield "shape along the draft", (scored.draft_pit, sample)
    if scored.id_pit is not None:
        yield "shape by token id", (scored.id_pit, sample)
    follows = scored.position > 0
    yield "after the token before", (np.where(follows, (u - np.roll(u, 1)) % 1, np.nan), sample)
    yield "beside the request before", ((u - _beside(scored, before)) % 1, sample)
    for name, chosen in (
        ("shape, first of a block", scored.offset == 0),
        ("shape, second of a block", scored.offset == 1),
        ("shape, later in a block", scored.offset > 1),
    ):
        if chosen.any():
            yield name, (np.where(chosen, u, np.nan), sample)


def _beside(scored: Scored, before: np.ndarray) -> np.ndarray:
    """[N] the PIT at the same position of the previous sample, NaN where it was shorter."""
    other = np.full(len(scored.pit), np.nan)
    starts = np.flatnonzero(np.diff(scored.sample, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(other)], strict=True):
        size = min(len(before), end - start)
        other[start : start + size] = before[:size]
        before = scored.pit[start:end]
    return other


def _intervals() -> list[tuple[int, int]]:
    """(level, index) of every dyadic interval: index / 2^level to (index + 1) / 2^level. Of two halves one suffices."""
    return [(1, 0), *((level, i) for level in range(2, _LEVELS + 1) for i in range(2**level))]


def _bumps() -> list[tuple[int, float, float]]:
    """(interval, log-gain inside, log-gain outside) of every shape bet."""
    bets = []
    for number, (level, _) in enumerate(_intervals()):
        width = 2.0**-level
        for more in (*BUMPS, *(-d for d in BUMPS)):
            mass = width + more
            if 0 < mass < 1:
                bets.append((number, math.log(mass / width), math.log((1 - mass) / (1 - width))))
    return bets


def _shape_bets(stream: tuple[np.ndarray, np.ndarray], ends: np.ndarray) -> Bets:
    """Parameters are interval numbers; log-gains [J, T] a sample."""
    u, _ = stream
    known = ~np.isnan(u)
    owner = np.searchsorted(ends, np.arange(len(u)))[known]
    finest = np.zeros((len(ends), 2**_LEVELS))
    np.add.at(finest, (owner, (u[known] * 2**_LEVELS).astype(int)), 1.0)
    total = finest.sum(1)
    inside = np.stack(
        [
            finest[:, i << (_LEVELS - level) : (i + 1) << (_LEVELS - level)].sum(1)
            for level, i in _intervals()
        ]
    )  # fmt: skip
    which, gain_in, gain_out = (np.array(column) for column in zip(*_bumps(), strict=True))
    hits = inside[which]
    return Bets(which.astype(float).tolist(), hits * gain_in[:, None] + (total - hits) * gain_out[:, None])


def _log_mean(logs: np.ndarray) -> np.ndarray:
    """[J, T] -> [T] log of the mean."""
    return np.logaddexp.reduce(logs, axis=0) - math.log(len(logs))
