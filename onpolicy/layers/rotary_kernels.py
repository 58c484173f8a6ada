"""numba kernels of :mod:`onpolicy.layers.rotary`. Imported at first use.

bf16 values are handed over as their bits, int16. Shape legend: T positions computed, N places they are laid out in,
H heads, K key heads, D head size, W = (H + 2 K) D.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.kernel_math import MATH, f32, i32, to_bf16
from spec import threads
from spec.compiled import REPRODUCIBLE

threads.launch()

_jit = njit(**REPRODUCIBLE, fastmath=MATH)
_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@_jit
def _rotate(source: Any, cos: Any, sin: Any, heads: int, out: Any) -> None:
    """Heads of one position, [heads * D] bf16 bits, turned: (a, b) -> (a cos - b sin, b cos + a sin)."""
    size, half = cos.size, cos.size // 2
    low_cos, high_cos, low_sin, high_sin = cos[:half], cos[half:], sin[:half], sin[half:]
    for h in range(heads):
        low, high = source[h * size : h * size + half], source[h * size + half : (h + 1) * size]
        to_low, to_high = out[h * size : h * size + half], out[h * size + half : (h + 1) * size]
        for j in range(half):
            a, b = i32(i32(low[j]) << i32(16)).view(f32), i32(i32(high[j]) << i32(16)).view(f32)
            to_low[j] = to_bf16(a * low_cos[j] - b * low_sin[j])
            to_high[j] = to_bf16(b * high_cos[j] + a * high_sin[j])


@_jit
def _lay_out(
    first: int, last: int, states: Any, cos: Any, sin: Any, places: Any, query: Any, key: Any, value: Any
) -> None:
    size = cos.shape[1]
    heads, shared, turned = query.shape[1] // size, key.shape[1] // size, query.shape[1] + key.shape[1]
    for i in range(first, last):
        t = places[i]
        row, to = states[t], value[i]
        _rotate(row, cos[t], sin[t], heads, query[i])
        _rotate(row[heads * size :], cos[t], sin[t], shared, key[i])
        source = row[turned:]
        for j in range(to.size):
            to[j] = source[j]


@_parallel
def lay_out(parts: int, states: Any, cos: Any, sin: Any, places: Any, query: Any, key: Any, value: Any) -> None:
    """Rows ``places`` [N] of ``states`` [T, W] -> query [N, H D] and key [N, K D], turned, and value [N, K D].

    cos, sin: [T, D] float32.
    """
    count = len(places)
    for part in prange(parts):
        _lay_out(count * part // parts, count * (part + 1) // parts, states, cos, sin, places, query, key, value)


@_jit
def _add(bits: Any, sums: Any) -> None:
    for j in range(bits.size):
        sums[j] += i32(i32(bits[j]) << i32(16)).view(f32)


@_jit
def _turn_back(sums: Any, cos: Any, sin: Any, heads: int, out: Any) -> None:
    """The transpose of :func:`_rotate`, from float32 sums [heads * D]."""
    size, half = cos.size, cos.size // 2
    low_cos, high_cos, low_sin, high_sin = cos[:half], cos[half:], sin[:half], sin[half:]
    for h in range(heads):
        low, high = sums[h * size : h * size + half], sums[h * size + half : (h + 1) * size]
        to_low, to_high = out[h * size : h * size + half], out[h * size + half : (h + 1) * size]
        for j in range(half):
            a, b = low[j], high[j]
            to_low[j] = to_bf16(a * low_cos[j] + b * high_sin[j])
            to_high[j] = to_bf16(b * high_cos[j] - a * low_sin[j])


@_jit
def _lay_out_backward(
    first: int, last: int, query: Any, key: Any, value: Any, cos: Any, sin: Any, slots: Any, begins: Any, out: Any
) -> None:
    size, wide, narrow = cos.shape[1], query.shape[1], key.shape[1]
    line = np.empty(wide + 2 * narrow, np.float32)
    for t in range(first, last):
        line[:] = 0
        to = out[t]
        for i in range(begins[t], begins[t + 1]):
            slot = slots[i]
            _add(query[slot], line)
            _add(key[slot], line[wide:])
            _add(value[slot], line[wide + narrow :])
        _turn_back(line, cos[t], sin[t], wide // size, to)
        _turn_back(line[wide:], cos[t], sin[t], narrow // size, to[wide:])
        sums, rest = line[wide + narrow :], to[wide + narrow :]
        for j in range(rest.size):
            rest[j] = to_bf16(sums[j])


@_parallel
def lay_out_backward(
    parts: int, query: Any, key: Any, value: Any, cos: Any, sin: Any, slots: Any, begins: Any, out: Any
) -> None:
    """Gradients laid out [N, H D], [N, K D], [N, K D] -> by the states [T, W], float32 sums over a position's places.

    slots: the places of position 0, then those of position 1, ...; begins [T + 1]: where each one's begin.
    """
    count = len(out)
    for part in prange(parts):
        first, last = count * part // parts, count * (part + 1) // parts
        _lay_out_backward(first, last, query, key, value, cos, sin, slots, begins, out)
