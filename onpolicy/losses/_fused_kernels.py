"""numba kernels of :mod:`onpolicy.losses._fused`. Imported there, at the first use.

Masked entries: -inf logits become the most negative number, so that 0 log 0 is 0 without a branch; a value that
this made astronomic instead of infinite is set to +inf at the end. NaN propagates. Sums run over blocks in float32
and over the row in float64.

One file on purpose: numba's disk cache notices a change of the file a kernel is in, not of what it calls elsewhere.
Reductions loop over slices, because indices that start anywhere but at 0 keep the compiler from vectorising.

Shape legend: Z, T one row [V] of student's and teacher's logits, minus their maximum and divided by the temperature;
A, B their exponentials; z, t, a, b one block of each.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, prange

from onpolicy.kernel_math import MATH, exp, f32, i32, log, maximum
from spec import threads
from spec.compiled import REPRODUCIBLE

threads.launch()

_BLOCK = 2048
_LOWEST = f32(-3e38)
_INFINITE = 1e30  # no divergence of finite logits is as large
_TINY = f32(1.2e-38)
_jit = njit(**REPRODUCIBLE, fastmath=MATH)
_parallel = njit(cache=True, nogil=True, error_model="numpy", parallel=True)


@_jit
def _scaled(x: Any, top: Any, inverse: Any) -> None:
    """x := (x - top) / T, -inf replaced."""
    for i in range(x.size):
        y = (x[i] - top) * inverse
        x[i] = _LOWEST if y < _LOWEST else y


@_jit
def _exponentials(X: Any, OUT: Any) -> float:
    """out = exp(x); its sum."""
    total = 0.0
    for start in range(0, X.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        x, out = X[block], OUT[block]
        part = f32(0.0)
        for i in range(x.size):
            e = exp(x[i])
            out[i] = e
            part += e
        total += part
    return total


@_jit
def _weighted(W: Any, X: Any) -> float:
    """sum w x."""
    total = 0.0
    for start in range(0, X.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        w, x = W[block], X[block]
        part = f32(0.0)
        for i in range(x.size):
            part += w[i] * x[i]
        total += part
    return total


@_jit
def _forward_kl(Z: Any, T: Any, A: Any, B: Any, p1: Any, q1: Any, shift: Any) -> float:
    """sum q (lq - lp); z := p - q. p1, q1: 1 / sums; shift: log-sum of student minus teacher."""
    total = 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, t, a, b = Z[block], T[block], A[block], B[block]
        part = f32(0.0)
        for i in range(z.size):
            q = b[i] * q1
            part += q * (t[i] - z[i] + shift)
            z[i] = a[i] * p1 - q
        total += part
    return total


@_jit
def _reverse_kl(Z: Any, T: Any, A: Any, p1: Any, shift: Any, differentiate: bool) -> float:
    """sum p (lp - lq); z := p (lp - lq - value)."""
    total = 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, t, a = Z[block], T[block], A[block]
        part = f32(0.0)
        for i in range(z.size):
            part += a[i] * p1 * (z[i] - t[i] - shift)
        total += part
    if differentiate:
        offset = f32(shift + total)
        for i in range(Z.size):
            Z[i] = A[i] * p1 * (Z[i] - T[i] - offset)
    return total


@_jit
def _jsd(Z: Any, T: Any, A: Any, B: Any, p1: Any, q1: Any, ls: Any, lt: Any, beta: Any) -> tuple[float, float]:
    """beta KL(q || m) and KL(p || m); z := log(p / m)."""
    rest = f32(1.0) - beta
    teacher, student = 0.0, 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, t, a, b = Z[block], T[block], A[block], B[block]
        part_t, part_s = f32(0.0), f32(0.0)
        for i in range(z.size):
            p, q = a[i] * p1, b[i] * q1
            m = beta * q + rest * p
            lm = log(m if not m < _TINY else _TINY)
            part_t += q * (t[i] - lt - lm)
            r = z[i] - ls - lm
            part_s += p * r
            z[i] = r
        teacher += part_t
        student += part_s
    return beta * teacher, student


@_jit
def _total_variation(Z: Any, A: Any, B: Any, p1: Any, q1: Any) -> tuple[float, float]:
    """1/2 sum |p - q| and sum p sign(p - q); z := sign(p - q)."""
    total, signed = 0.0, 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, a, b = Z[block], A[block], B[block]
        part, part_s = f32(0.0), f32(0.0)
        for i in range(z.size):
            p = a[i] * p1
            d = p - b[i] * q1
            s = f32(1.0) if d > 0 else (f32(-1.0) if d < 0 else f32(0.0))
            part += d * s if d == d else d
            part_s += p * s
            z[i] = s
        total += part
        signed += part_s
    return 0.5 * total, signed


@_jit
def _skew_forward(Z: Any, T: Any, A: Any, B: Any, p1: Any, q1: Any, lt: Any, skew: Any) -> tuple[float, float]:
    """KL(q || m), m = skew q + (1 - skew) p, and sum of the scores; z := score / p."""
    rest = f32(1.0) - skew
    total, scores = 0.0, 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, t, a, b = Z[block], T[block], A[block], B[block]
        part, part_s = f32(0.0), f32(0.0)
        for i in range(z.size):
            p, q = a[i] * p1, b[i] * q1
            m = skew * q + rest * p
            m = m if not m < _TINY else _TINY
            part += q * (t[i] - lt - log(m))
            g = -rest * q / m
            part_s += p * g
            z[i] = g
        total += part
        scores += part_s
    return total, scores


@_jit
def _skew_reverse(Z: Any, A: Any, B: Any, p1: Any, q1: Any, ls: Any, skew: Any) -> tuple[float, float]:
    """KL(p || m), m = skew p + (1 - skew) q, and sum of the scores; z := score / p."""
    rest = f32(1.0) - skew
    total, scores = 0.0, 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, a, b = Z[block], A[block], B[block]
        part, part_s = f32(0.0), f32(0.0)
        for i in range(z.size):
            p, q = a[i] * p1, b[i] * q1
            m = skew * p + rest * q
            m = m if not m < _TINY else _TINY
            gap = z[i] - ls - log(m)
            part += p * gap
            g = gap + f32(1.0) - skew * p / m
            part_s += p * g
            z[i] = g
        total += part
        scores += part_s
    return total, scores


@_jit
def _centred(z: Any, a: Any, p1: Any, mean: Any, factor: Any) -> None:
    """z := factor p (z - mean): a score divided by p, sent through the softmax."""
    for i in range(z.size):
        z[i] = factor * a[i] * p1 * (z[i] - mean)


@_jit
def _hybrid(Z: Any, T: Any, A: Any, B: Any, p1: Any, q1: Any, shift: Any, eta: float) -> float:
    """lam KL(q || p) + (1 - lam) TV, lam = exp(-eta (1 - TV)); z := its gradient."""
    kl, tv, signed = 0.0, 0.0, 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, t, a, b = Z[block], T[block], A[block], B[block]
        part, part_v, part_s = f32(0.0), f32(0.0), f32(0.0)
        for i in range(z.size):
            p, q = a[i] * p1, b[i] * q1
            d = p - q
            s = f32(1.0) if d > 0 else (f32(-1.0) if d < 0 else f32(0.0))
            part += q * (t[i] - z[i] + shift)
            part_v += d * s if d == d else d
            part_s += p * s
            z[i] = s
        kl += part
        tv += part_v
        signed += part_s
    tv *= 0.5
    lam = math.exp(-eta * (1 - tv))
    weight, half, mean = f32(lam), f32(0.5 * (1 - lam)), f32(signed)
    for i in range(Z.size):
        p = A[i] * p1
        Z[i] = weight * (p - B[i] * q1) + half * p * (Z[i] - mean)
    return lam * (kl if kl < _INFINITE or kl != kl else np.inf) + (1 - lam) * tv


@_jit
def _finish(z: Any, bits: Any, factor: Any) -> None:
    """z *= factor; bits := z rounded to bf16, nearest even, where there is room for it."""
    for i in range(z.size):
        z[i] *= factor
    if bits.size:
        words = z.view(i32)
        for i in range(z.size):
            w = words[i]
            bits[i] = np.int16((w + i32(0x7FFF) + ((w >> i32(16)) & i32(1))) >> i32(16))


@_jit
def _row(code: int, parameter: float, z: Any, t: Any, a: Any, b: Any, ss: float, st: float, grad: bool) -> float:
    """Value of one row; z := its gradient by (z / T), if ``grad``."""
    p1, q1 = f32(1 / ss), f32(1 / st)
    ls, lt = f32(math.log(ss)), f32(math.log(st))
    shift = f32(ls - lt)
    if code == 0:
        return _forward_kl(z, t, a, b, p1, q1, shift)
    if code == 1:
        return _reverse_kl(z, t, a, p1, shift, grad)
    if code == 6:
        return _hybrid(z, t, a, b, p1, q1, shift, parameter)
    constant, factor = f32(parameter), f32(1.0)
    if code == 2:
        teacher, mean = _jsd(z, t, a, b, p1, q1, ls, lt, constant)
        factor = f32(1 - parameter)
        value = teacher + (1 - parameter) * mean
    elif code == 3:
        value, mean = _total_variation(z, a, b, p1, q1)
        factor = f32(0.5)
    elif code == 4:
        value, mean = _skew_forward(z, t, a, b, p1, q1, lt, constant)
    else:
        value, mean = _skew_reverse(z, a, b, p1, q1, ls, constant)
    if grad:
        _centred(z, a, p1, f32(mean), factor)
    return value


@_jit
def _rows(
    code: int,
    parameter: float,
    inverse: float,  # 1 / temperature
    grad: bool,
    first: int,
    last: int,
    student: Any,  # [n, V] float32
    teacher: Any,  # [n, V] float32
    bits: Any,  # [n, V] or [n, 0] int16
    ids: Any,  # [n] int64, -1 for none
    factors: Any,  # [n] float32
    stats: Any,  # [4, n] float32: value, entropy, log-probabilities of student and teacher
) -> None:
    """Rows ``first`` to ``last``: statistics into ``stats``, gradient times factor into ``student`` and ``bits``."""
    a, b = np.empty(student.shape[1], f32), np.empty(student.shape[1], f32)
    for r in range(first, last):
        z, t = student[r], teacher[r]
        _scaled(z, maximum(z), f32(inverse))
        _scaled(t, maximum(t), f32(inverse))
        ss, st = _exponentials(z, a), _exponentials(t, b)
        stats[1, r] = math.log(ss) - _weighted(a, z) / ss
        if ids[r] >= 0:
            stats[2, r] = z[ids[r]] - math.log(ss) if z[ids[r]] > -_INFINITE else -np.inf
            stats[3, r] = t[ids[r]] - math.log(st) if t[ids[r]] > -_INFINITE else -np.inf
        value = _row(code, parameter, z, t, a, b, ss, st, grad)
        if ss != ss or st != st:  # a NaN logit; the logarithm's integer arithmetic would lose it
            value = np.nan
        stats[0, r] = np.inf if value > _INFINITE else value
        if grad:
            _finish(z, bits[r], factors[r])


@_parallel
def rows(
    parts: int, code: int, parameter: float, inverse: float, grad: bool, student: Any, teacher: Any, bits: Any,
    ids: Any, factors: Any, stats: Any,
) -> None:  # fmt: skip
    """All rows, see :func:`_rows`, on ``parts`` threads."""
    count = len(student)
    for part in prange(parts):
        first, last = count * part // parts, count * (part + 1) // parts
        _rows(code, parameter, inverse, grad, first, last, student, teacher, bits, ids, factors, stats)


@_jit
def _first(x: Any, top: Any) -> int:
    """Where a row's maximum stands first."""
    for i in range(x.size):
        if x[i] == top:
            return i
    return -1  # NaN


@_jit
def _overlap(Z: Any, T: Any, A: Any, B: Any, p1: Any, q1: Any, shift: Any) -> tuple[float, float, float]:
    """sum p (lp - lq), sum q (lq - lp) and sum min(p, q)."""
    reverse, forward, common = 0.0, 0.0, 0.0
    for start in range(0, Z.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        z, t, a, b = Z[block], T[block], A[block], B[block]
        part_r, part_f, part_c = f32(0.0), f32(0.0), f32(0.0)
        for i in range(z.size):
            p, q = a[i] * p1, b[i] * q1
            gap = z[i] - t[i] - shift
            part_r += p * gap
            part_f -= q * gap
            part_c += p if p < q else q
        reverse += part_r
        forward += part_f
        common += part_c
    return reverse, forward, common


@_jit
def _comparisons(agreement_only: bool, first: int, last: int, student: Any, teacher: Any, ids: Any, out: Any) -> None:
    """Rows ``first`` to ``last`` of logits [n, V] (overwritten) at temperature 1 -> ``out`` [6, n] float64.

    Same most likely token, KL(student || teacher), KL(teacher || student), sum of min(p, q), and the log-probabilities
    of ``ids`` [n] under student and teacher; the first alone if ``agreement_only``.
    """
    a, b = np.empty(student.shape[1], f32), np.empty(student.shape[1], f32)
    for r in range(first, last):
        z, t = student[r], teacher[r]
        top_z, top_t = maximum(z), maximum(t)
        out[0, r] = 1.0 if _first(z, top_z) == _first(t, top_t) else 0.0
        if agreement_only:
            continue
        _scaled(z, top_z, f32(1.0))
        _scaled(t, top_t, f32(1.0))
        ss, st = _exponentials(z, a), _exponentials(t, b)
        ls, lt = math.log(ss), math.log(st)
        reverse, forward, common = _overlap(z, t, a, b, f32(1 / ss), f32(1 / st), f32(ls - lt))
        if ss != ss or st != st:  # a NaN logit
            reverse = forward = common = np.nan
        out[1, r] = np.inf if reverse > _INFINITE else reverse
        out[2, r] = np.inf if forward > _INFINITE else forward
        out[3, r] = common
        out[4, r] = -np.inf if z[ids[r]] < -_INFINITE else z[ids[r]] - ls
        out[5, r] = -np.inf if t[ids[r]] < -_INFINITE else t[ids[r]] - lt


@_parallel
def comparisons(parts: int, agreement_only: bool, student: Any, teacher: Any, ids: Any, out: Any) -> None:
    """All rows, see :func:`_comparisons`, on ``parts`` threads."""
    count = len(student)
    for part in prange(parts):
        _comparisons(agreement_only, count * part // parts, count * (part + 1) // parts, student, teacher, ids, out)
