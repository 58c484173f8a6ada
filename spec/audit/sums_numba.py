"""What :mod:`spec.audit.sums` computes on a CPU, compiled by numba. Imported only where it runs."""

from __future__ import annotations

import numba
import numpy as np

from spec import threads
from spec.compiled import REPRODUCIBLE
from spec.sampling_numba import largest

threads.launch()

_CHUNK = 1024  # probabilities summed in their own precision before float64 takes over


_REORDERED = {"reassoc", "nsz", "nnan"}  # lets sums vectorise; the order of tokens may be infinite
_jit = numba.njit(**REPRODUCIBLE, fastmath=_REORDERED)
_jit_parallel = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_REORDERED, parallel=True)


@_jit_parallel
def power_sums(p, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [F, n] float64 from p [n, V]."""
    for row in numba.prange(len(p)):
        out[:, row] = 0.0
        for start in range(0, p.shape[1], _CHUNK):
            _add_powers(p[row, start : start + _CHUNK], out[:, row])


@_jit_parallel
def mass_ahead(p, order, tokens, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [2, n] float64."""
    for row in numba.prange(len(p)):
        here = order[row, tokens[row]]
        out[:, row] = 0.0
        for start in range(0, p.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            ahead, level = _compared(p[row, part], order[row, part], here)
            out[0, row] += ahead
            out[1, row] += level


@_jit_parallel
def mass_before(p, tokens, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [1, n] float64."""
    for row in numba.prange(len(p)):
        out[0, row] = 0.0
        for start in range(0, tokens[row], _CHUNK):
            out[0, row] += _total(p[row, start : min(start + _CHUNK, tokens[row])])


@_jit_parallel
def mass_outside(law, p, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [1, n] float64."""
    for row in numba.prange(len(p)):
        out[0, row] = 0.0
        for start in range(0, p.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            out[0, row] += _outside(law[row, part], p[row, part])


@_jit_parallel
def top_tokens(p, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [n] int64."""
    for row in numba.prange(len(p)):
        top, at = largest(p[row]), 0
        while p[row, at] < top:
            at += 1
        out[row] = at


@_jit_parallel
def row_sums(p, surprise, unlikely, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [6, n] float64 in the order of :class:`spec.audit.sums.RowSums`; the second pass finds p cached."""
    for row in numba.prange(len(p)):
        out[:, row] = 0.0
        for start in range(0, p.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            entropy, squares = _moments(p[row, part], surprise[row, part])
            out[0, row] += entropy
            out[1, row] += squares
        out[2, row] = typical = p.dtype.type(np.exp(-out[0, row]))
        for start in range(0, p.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            surprising, rare, count = _shares(p[row, part], typical, unlikely)
            out[3, row] += surprising
            out[4, row] += rare
            out[5, row] += count


@_jit_parallel
def overlaps(p, q, lenient, strict, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [5, n] float64 in the order of :class:`spec.audit.sums.Overlaps`."""
    for row in numba.prange(len(p)):
        out[:, row] = 0.0
        for start in range(0, p.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            liked, outside, residual, most, least = _overlaps(p[row, part], q[row, part], lenient, strict)
            out[0, row] += liked
            out[1, row] += outside
            out[2, row] += residual
            out[3, row] += most
            out[4, row] += least


@_jit
def _total(p):  # type: ignore[no-untyped-def]
    total = p[0] - p[0]  # zero of p's own precision
    for x in range(len(p)):
        total += p[x]
    return total


@_jit
def _outside(law, p):  # type: ignore[no-untyped-def]
    total = p[0] - p[0]
    for x in range(len(p)):
        total += 0 if p[x] > 0 else law[x]
    return total


@_jit
def _moments(p, surprise):  # type: ignore[no-untyped-def]
    entropy = squares = p[0] - p[0]
    for x in range(len(p)):
        once = p[x] * surprise[x]
        entropy += once
        squares += once * surprise[x]
    return entropy, squares


@_jit
def _shares(p, typical, unlikely):  # type: ignore[no-untyped-def]
    surprising = rare = count = p[0] - p[0]
    for x in range(len(p)):
        surprising += p[x] if p[x] < typical else 0
        rare += p[x] if p[x] < unlikely else 0
        count += 1 if p[x] > 0 else 0
    return surprising, rare, count


@_jit
def _overlaps(p, q, lenient, strict):  # type: ignore[no-untyped-def]
    zero = p[0] - p[0]
    liked = outside = residual = most = least = zero
    for x in range(len(p)):
        liked += p[x] if q[x] > p[x] else 0
        outside += 0 if p[x] > 0 else q[x]
        residual += max(p[x] - q[x], zero)
        most += min(q[x], lenient * p[x])
        least += min(q[x], strict * p[x])
    return liked, outside, residual, most, least


@_jit
def _compared(p, order, here):  # type: ignore[no-untyped-def]
    ahead = level = p[0] - p[0]  # zero of p's own precision
    for x in range(len(p)):
        ahead += p[x] if order[x] > here else 0
        level += p[x] if order[x] == here else 0
    return ahead, level


@_jit
def _add_powers(p, out):  # type: ignore[no-untyped-def]
    """p^(64, 32, 24, 20, 18, 17, 15, 14, 12, 10, 8, 4, 1)/16, in locals: an array of sums would not be vectorised."""
    zero = p[0] - p[0]
    a = b = c = d = e = f = g = h = i = j = k = m = n = zero
    for x in range(len(p)):
        r16 = p[x]
        r8 = np.sqrt(r16)
        r4 = np.sqrt(r8)
        r2 = np.sqrt(r4)
        r1 = np.sqrt(r2)
        r32, r12, r3 = r16 * r16, r8 * r4, r2 * r1
        a += r32 * r32
        b += r32
        c += r16 * r8
        d += r16 * r4
        e += r16 * r2
        f += r16 * r1
        g += r12 * r3
        h += r12 * r2
        i += r12
        j += r8 * r2
        k += r8
        m += r4
        n += r1
    for at, total in enumerate((a, b, c, d, e, f, g, h, i, j, k, m, n)):
        out[at] += total
