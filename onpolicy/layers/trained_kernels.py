"""numba kernels of :mod:`onpolicy.layers.trained`: norms and gates, forward and backward. Imported at first use.

bf16 values are handed over as their bits, int16. Shape legend: n rows, C columns of a norm, F of a gate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.kernel_math import MATH, exp, f32, i32, to_bf16
from spec import threads
from spec.compiled import REPRODUCIBLE

threads.launch()

_jit = njit(**REPRODUCIBLE, fastmath=MATH)
_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@_jit
def _rms_norm(first: int, last: int, x: Any, weight: Any, epsilon: Any, out: Any, factors: Any) -> None:
    size = x.shape[1]
    for r in range(first, last):
        row, to = x[r], out[r]
        total = f32(0.0)
        for j in range(size):
            total += row[j] * row[j]
        factor = f32(1.0) / np.sqrt(total / f32(size) + epsilon)
        for j in range(size):
            to[j] = to_bf16(row[j] * factor * weight[j])
        factors[r] = factor


@_parallel
def rms_norm(parts: int, x: Any, weight: Any, epsilon: Any, out: Any, factors: Any) -> None:
    """``out`` [n, C] bf16 bits = x * factors * weight, float32; factors [n] = 1 / sqrt(mean x^2 + epsilon)."""
    count = len(x)
    for part in prange(parts):
        _rms_norm(count * part // parts, count * (part + 1) // parts, x, weight, epsilon, out, factors)


@_jit
def _rms_norm_backward(
    first: int, last: int, grad: Any, x: Any, weight: Any, factors: Any, d_x: Any, d_weight: Any
) -> None:
    """With y = f w x: dx = f w dy - x f^3 / C * sum w dy x; ``d_weight`` [C] += sum over rows of f dy x."""
    size = x.shape[1]
    line = np.empty(size, np.float32)
    for r in range(first, last):
        slopes, row, to, factor = grad[r], x[r], d_x[r], factors[r]
        total = f32(0.0)
        for j in range(size):
            slope = i32(i32(slopes[j]) << i32(16)).view(f32)
            line[j] = slope * weight[j]
            total += line[j] * row[j]
            d_weight[j] += slope * row[j] * factor
        inward = total * factor * factor * factor / f32(size)
        for j in range(size):
            to[j] = line[j] * factor - row[j] * inward


@_parallel
def rms_norm_backward(parts: int, grad: Any, x: Any, weight: Any, factors: Any, d_x: Any, d_weights: Any) -> None:
    """Gradients by x [n, C] and, in ``parts`` parts to be added up, by the weight [parts, C]; grad as bf16 bits."""
    count = len(x)
    for part in prange(parts):
        first, last = count * part // parts, count * (part + 1) // parts
        _rms_norm_backward(first, last, grad, x, weight, factors, d_x, d_weights[part])


@_jit
def _silu_mul_backward(first: int, last: int, x: Any, grad: Any, d_x: Any) -> None:
    """With y = g s(g) u: du = dy g s, dg = dy u s (1 + g (1 - s))."""
    size = grad.shape[1]
    for r in range(first, last):
        gates, through, slopes = x[r, :size], x[r, size:], grad[r]
        to_gates, to_through = d_x[r, :size], d_x[r, size:]
        for j in range(size):
            gate = i32(i32(gates[j]) << i32(16)).view(f32)
            slope = i32(i32(slopes[j]) << i32(16)).view(f32)
            small = exp(-abs(gate))
            share = (f32(1.0) if gate >= f32(0.0) else small) / (f32(1.0) + small)
            to_through[j] = to_bf16(slope * gate * share)
            slope *= i32(i32(through[j]) << i32(16)).view(f32)
            to_gates[j] = to_bf16(slope * share * (f32(1.0) + gate * (f32(1.0) - share)))


@_parallel
def silu_mul_backward(parts: int, x: Any, grad: Any, d_x: Any) -> None:
    """Gradient by x [n, 2 F] (gates, then what they let through) of silu(gates) * through [n, F]; all bf16 bits."""
    count = len(x)
    for part in prange(parts):
        _silu_mul_backward(count * part // parts, count * (part + 1) // parts, x, grad, d_x)
