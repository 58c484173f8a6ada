"""The numba kernel of :mod:`onpolicy.rollouts.draw`. Imported at first use.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.kernel_math import MATH, exp, f32, maximum
from spec import threads
from spec.compiled import REPRODUCIBLE

threads.launch()

_BLOCK = 256  # near the square root of a usual V, so that both levels of the search cost the same
_jit = njit(**REPRODUCIBLE, fastmath=MATH)
_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@_jit
def _exponentials(row: Any, top: Any, inverse: Any, weights: Any, sums: Any) -> float:
    """``weights`` = exp((row - top) / temperature), ``sums`` of every block of them; their total."""
    total = 0.0
    for block in range(sums.size):
        z, w = row[block * _BLOCK : (block + 1) * _BLOCK], weights[block * _BLOCK : (block + 1) * _BLOCK]
        part = f32(0.0)
        for i in range(z.size):
            e = exp((z[i] - top) * inverse)
            w[i] = e
            part += e
        sums[block] = part
        total += part
    return total


@_jit
def _place(weights: Any, share: float) -> tuple[int, float]:
    """The index whose part of the weights' sum holds ``share`` of it, and where in that part, [0, 1)."""
    total = 0.0
    for i in range(weights.size):
        total += weights[i]
    target, upper, last = share * total, 0.0, -1
    for i in range(weights.size):
        lower = upper
        upper += weights[i]
        if weights[i] > 0.0:
            if target < upper:
                return i, min(max((target - lower) / weights[i], 0.0), 1.0 - 2.0**-53)
            last = i
    return last, 1.0 - 2.0**-53  # the two sums round differently, or the share rounds to the whole


@_jit
def _draw(first: int, last: int, logits: Any, inverse: Any, uniform: Any, tokens: Any, logprobs: Any) -> None:
    vocab = logits.shape[1]
    weights, sums = np.empty(vocab, np.float32), np.empty(-(-vocab // _BLOCK), np.float64)
    for r in range(first, last):
        row = logits[r]
        top = maximum(row)
        total = _exponentials(row, top, inverse, weights, sums)
        if not (total > 0.0 and abs(top * inverse) < np.inf):  # NaN, +inf, or -inf alone
            tokens[r] = -1
            continue
        block, share = _place(sums, uniform[r])
        inside, _ = _place(weights[block * _BLOCK : (block + 1) * _BLOCK], share)
        tokens[r] = block * _BLOCK + inside
        logprobs[r] = (row[tokens[r]] - top) * inverse - math.log(total)


@_parallel
def draw(parts: int, logits: Any, inverse: Any, uniform: Any, tokens: Any, logprobs: Any) -> None:
    """``tokens`` [B] int64 and ``logprobs`` [B] float32 from logits [B, V] float32, on ``parts`` threads.

    The token is the smallest v with uniform < cdf(v) at temperature 1 / ``inverse``; -1 where a row is no distribution.
    """
    count = len(logits)
    for part in prange(parts):
        _draw(count * part // parts, count * (part + 1) // parts, logits, inverse, uniform, tokens, logprobs)
