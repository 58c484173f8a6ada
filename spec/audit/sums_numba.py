"""What :mod:`spec.audit.sums` computes on a CPU, compiled by numba. Imported only where it runs."""

from __future__ import annotations

import numba
import numpy as np

from spec import threads

threads.launch()

_CHUNK = 1024  # probabilities summed in their own precision before float64 takes over


_REORDERED = {"reassoc", "nsz", "nnan"}  # lets sums vectorise; the order of tokens may be infinite
_jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_REORDERED)
_jit_parallel = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_REORDERED, parallel=True)


@_jit_parallel
def power_sums(p, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [n, F] float64 from p [n, V]."""
    for row in numba.prange(len(p)):
        out[row] = 0.0
        for start in range(0, p.shape[1], _CHUNK):
            _add_powers(p[row, start : start + _CHUNK], out[row])


@_jit_parallel
def mass_ahead(p, order, tokens, out):  # type: ignore[no-untyped-def]
    """Fills ``out`` [2, n] float64."""
    for row in numba.prange(len(p)):
        here = order[row, tokens[row]]
        out[0, row] = out[1, row] = 0.0
        for start in range(0, p.shape[1], _CHUNK):
            part = slice(start, start + _CHUNK)
            ahead, level = _compared(p[row, part], order[row, part], here)
            out[0, row] += ahead
            out[1, row] += level


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
