"""The sort-free search of :mod:`spec.sampling_kernels`, compiled by numba. Imported only where it runs.

Top-k and top-p are one question with different weights (1, or the probability): which is the lowest logit with less
than ``need`` weight strictly above it? Bisection on the logit narrows it down, each step one vectorised pass over the
row, until few candidates are left; only those are sorted.
"""

from __future__ import annotations

import numba
import numpy as np

_NATS = 64.0  # the bisection's first interval below the maximum; what lies deeper has weight < e^-64
_FEW = 64  # candidates not worth another pass
_STEPS = 24
_CHUNK = 64  # tokens looked at together when candidates are collected
_jit = numba.njit(cache=True, nogil=True)
_pass = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "nnan"})  # lets reductions vectorise


@_jit
def floors(logits, weights, k, p, m, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [N] with the lowest kept logit of each row.

    logits [N, V], no NaN; weights [N, V] = exp(logits - row maximum); k [N] in 1..V; p, m [N] float64.
    """
    for row in range(len(logits)):
        out[row] = _row_floor(logits[row], weights[row], k[row], p[row], m[row])


@_jit
def drop_below(logits, floor, out):  # type: ignore[no-untyped-def]
    """out [N, V] = logits where they reach their row's floor [N], -inf elsewhere. torch's masked_fill is slower."""
    for row in range(len(logits)):
        for x in range(logits.shape[1]):
            out[row, x] = logits[row, x] if logits[row, x] >= floor[row] else -np.inf


@_jit
def _row_floor(logits, weights, k, p, m):  # type: ignore[no-untyped-def]
    top = largest(logits)
    floor = _lowest_kept(logits, weights, m, top) if m > 0 else -np.inf  # min-p
    if k < len(logits):
        floor = max(floor, _search(logits, weights, top, k, True))
    if p < 1:
        total = _mass_from(logits, weights, floor)
        floor = max(floor, _search(logits, weights, top, p * total, False))
    return floor


@_jit
def _search(logits, weights, top, need, counting):  # type: ignore[no-untyped-def]
    """The lowest logit with less than ``need`` weight (count, if ``counting``) strictly above it.

    The kept set is an up-set, so what an earlier filter has dropped lies below every logit that is asked about.
    """
    low, high = -np.inf, np.float64(top)
    mass_above, count_low, count_high = 0.0, len(logits), 0  # weight and count strictly above
    middle = high - _NATS
    for _ in range(_STEPS):
        mass, count = _above(logits, weights, middle)
        if (count if counting else mass) < need:
            high, mass_above, count_high = middle, mass, count
        else:
            low, count_low = middle, count
        if low == -np.inf or count_low - count_high <= _FEW:
            break  # everything interesting lies below the first interval, or little is left
        middle = (low + high) / 2
    above = np.float64(count_high) if counting else mass_above
    return _walk(logits, weights, _between(logits, low, high, count_low - count_high), above, need, counting)


@_jit
def _walk(logits, weights, members, above, need, counting):  # type: ignore[no-untyped-def]
    """Descends through ``members`` with ``above`` weight above all of them; a tie stands or falls together."""
    order = members[np.argsort(-logits[members])]
    floor, at = -np.inf, 0
    while at < len(order) and above < need:
        floor = logits[order[at]]
        while at < len(order) and logits[order[at]] == floor:
            above += 1.0 if counting else weights[order[at]]
            at += 1
    return floor


@_pass
def _lowest_kept(logits, weights, m, top):  # type: ignore[no-untyped-def]
    lowest = top
    for x in range(len(logits)):
        lowest = min(lowest, logits[x] if weights[x] >= m else top)
    return lowest


@_pass
def _mass_from(logits, weights, floor):  # type: ignore[no-untyped-def]
    mass = 0.0
    for x in range(len(logits)):
        mass += np.float64(weights[x]) if logits[x] >= floor else 0.0
    return mass


@_pass
def _above(logits, weights, middle):  # type: ignore[no-untyped-def]
    """Weight and count of the tokens strictly above ``middle``."""
    mass, count = 0.0, 0
    for x in range(len(logits)):
        inside = logits[x] > middle
        mass += np.float64(weights[x]) if inside else 0.0
        count += 1 if inside else 0
    return mass, count


@_pass
def largest(logits):  # type: ignore[no-untyped-def]
    """Of a row; numpy's own does not vectorise."""
    top = logits[0]
    for x in range(len(logits)):
        top = max(top, logits[x])
    return top


@_pass
def _inside(logits, low, high):  # type: ignore[no-untyped-def]
    count = 0
    for x in range(len(logits)):
        count += 1 if (logits[x] > low) & (logits[x] <= high) else 0
    return count


@_jit
def _between(logits, low, high, size):  # type: ignore[no-untyped-def]
    """The ``size`` token ids with low < logit <= high; low = -inf takes all that are at most ``high``."""
    found = np.empty(size, dtype=np.int64)
    at = 0
    for start in range(0, len(logits), _CHUNK):
        chunk = logits[start : start + _CHUNK]
        if low == -np.inf or _inside(chunk, low, high) > 0:
            for x in range(len(chunk)):
                if (chunk[x] > low or low == -np.inf) and chunk[x] <= high and at < size:
                    found[at] = start + x
                    at += 1
    return found[:at]
