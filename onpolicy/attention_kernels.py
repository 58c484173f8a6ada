"""The softmax of causal attention and its gradient, one pass over the scores each, compiled by numba.

bf16 values are handed over as their bits, int16. One file on purpose: numba's disk cache notices a change of the file a
kernel is in, not of what it calls elsewhere.

Shape legend: B sequences times key heads, R = G * M queries of each (G heads under one another), M positions.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from spec import threads

threads.launch()

f32: Any = np.float32
i32: Any = np.int32
_OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "arcp", "nsz"}}
_inline = numba.njit(inline="always", **_OPTIONS)
_parallel = numba.njit(parallel=True, **_OPTIONS)


@_inline
def _narrow(x: Any) -> Any:
    """float32 -> bf16 bits, to nearest, ties to even; finite values only."""
    bits = f32(x).view(i32)
    return np.int16((bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) >> i32(16))


@_inline
def _exp(x: Any) -> Any:
    """exp for x <= 0 (and a rounding above), relative error about 1e-7 (Cephes' polynomial); 0 below -87."""
    y = x if not x < f32(-87.0) else f32(-87.0)
    n = np.floor(y * f32(1.44269504) + f32(0.5))
    r = y - n * f32(0.693359375) + n * f32(2.12194440e-4)
    s = f32(1.9875691500e-4)
    s = s * r + f32(1.3981999507e-3)
    s = s * r + f32(8.3334519073e-3)
    s = s * r + f32(4.1665795894e-2)
    s = s * r + f32(1.6666665459e-1)
    s = s * r + f32(5.0000001201e-1)
    s = s * r * r + r + f32(1.0)
    power = i32((i32(n) + i32(127)) << i32(23)).view(f32)
    return f32(0.0) if x < f32(-87.0) else s * power


@_parallel
def softmax(scores, scale, probs, normalisers):  # type: ignore[no-untyped-def]
    """probs [B, R, M] bf16 = causal softmax of scale * scores [B, R, M] float32 (overwritten).

    ``normalisers`` [B, R] float32: log of the sum of exponentials, for the gradient.
    """
    positions = scores.shape[2]
    for job in numba.prange(scores.shape[0] * scores.shape[1]):
        b, r = job // scores.shape[1], job % scores.shape[1]
        seen = r % positions + 1
        row, out, rest = scores[b, r, :seen], probs[b, r, :seen], probs[b, r, seen:]
        top = row[0]
        for j in range(row.size):
            top = max(top, row[j])
        total = f32(0.0)
        for j in range(row.size):
            e = _exp(scale * (row[j] - top))
            row[j] = e
            total += e
        inverse = f32(1.0) / total
        for j in range(row.size):
            out[j] = _narrow(row[j] * inverse)
        for j in range(rest.size):
            rest[j] = 0
        normalisers[b, r] = scale * top + np.log(total)


@_parallel
def gradient(scores, normalisers, d_probs, inner, scale, probs, d_scores):  # type: ignore[no-untyped-def]
    """The probabilities again, and the gradient by the scores: P * (dP - inner) * scale, both bf16.

    scores, d_probs [B, R, M] float32; normalisers, inner [B, R] float32, inner = sum dO * O (Dao et al. 2205.14135,
    appendix B); probs, d_scores [B, R, M], 0 where a query does not look.
    """
    positions = scores.shape[2]
    for job in numba.prange(scores.shape[0] * scores.shape[1]):
        b, r = job // scores.shape[1], job % scores.shape[1]
        seen = r % positions + 1
        row, change = scores[b, r, :seen], d_probs[b, r, :seen]
        out, slope = probs[b, r, :seen], d_scores[b, r, :seen]
        normaliser, mean = normalisers[b, r], inner[b, r]
        for j in range(row.size):
            p = _exp(scale * row[j] - normaliser)
            out[j] = _narrow(p)
            slope[j] = _narrow(p * (change[j] - mean) * scale)
        rest, flat = probs[b, r, seen:], d_scores[b, r, seen:]
        for j in range(rest.size):
            rest[j] = 0
            flat[j] = 0
