"""The rows of :mod:`onpolicy.losses._fused` on a GPU: one Triton program a row. Imported there, at the first use.

A program reads its row of both models' logits three times: maximum and sum of exponentials in one online pass, sums of
the divergence, gradient. A GPU's programs of a moment read some 50 MB, so the second and third time come from its
cache. Running maxima and sums stay one a lane until the end of a pass: threads wait for each other once a pass, not
once a block. Masked and astronomic values are treated as in :mod:`onpolicy.losses._fused_kernels`, whose formulas these
are.

Shape legend: n rows, V vocabulary; z, t one block of student's and teacher's logits, minus their maximum and divided by
the temperature; p, q their probabilities.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 2048, 8
_LOWEST = tl.constexpr(-3e38)
_INFINITE = tl.constexpr(1e30)  # no divergence of finite logits is as large
_TINY = tl.constexpr(1.2e-38)


@triton.jit
def _scaled(row, at, size, inverse, top):  # type: ignore[no-untyped-def]
    """One block of logits, minus ``top`` and divided by the temperature; -inf, and what lies beyond, replaced."""
    x = tl.load(row + at, mask=at < size, other=float("-inf"))
    y = (x - top) * inverse
    return tl.where(y < _LOWEST, _LOWEST, y)


@triton.jit
def _normaliser(row, size, inverse, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Maximum of a row's logits, and the sum of exponentials of what is left of them."""
    tops = tl.full((BLOCK,), _LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < size, other=float("-inf"))
        higher = tl.maximum(tops, x)
        sums = sums * tl.exp((tops - higher) * inverse) + tl.exp((x - higher) * inverse)  # NaN stays in the sum
        tops = higher
    top = tl.max(tops, 0)
    return top, tl.sum(sums * tl.exp((tops - top) * inverse), 0)


@triton.jit
def _terms(CODE: tl.constexpr, constant, z, t, p, q, ls, lt):  # type: ignore[no-untyped-def]
    """What a place adds to the (up to three) sums of its divergence."""
    none = tl.zeros_like(z)
    if CODE == 0:
        return q * (t - z + (ls - lt)), none, none
    elif CODE == 1:
        return p * (z - t - (ls - lt)), none, none
    elif CODE == 2:
        lm = tl.log(tl.maximum(constant * q + (1 - constant) * p, _TINY))
        return q * (t - lt - lm), p * (z - ls - lm), none
    elif CODE == 4:
        m = tl.maximum(constant * q + (1 - constant) * p, _TINY)
        return q * (t - lt - tl.log(m)), p * (-(1 - constant) * q / m), none
    elif CODE == 5:
        m = tl.maximum(constant * p + (1 - constant) * q, _TINY)
        gap = z - ls - tl.log(m)
        return p * gap, p * (gap + 1 - constant * p / m), none
    else:
        sign = tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))
        return tl.abs(p - q), p * sign, q * (t - z + (ls - lt))


@triton.jit
def _slope(CODE: tl.constexpr, constant, first, second, share, z, t, p, q, ls, lt):  # type: ignore[no-untyped-def]
    """The gradient by z, given the sums; ``share`` of the hybrid's Kullback-Leibler divergence."""
    if CODE == 0:
        return p - q
    elif CODE == 1:
        return p * (z - t - (ls - lt) - first)
    elif CODE == 2:
        lm = tl.log(tl.maximum(constant * q + (1 - constant) * p, _TINY))
        return (1 - constant) * p * (z - ls - lm - second)
    elif CODE == 4:
        m = tl.maximum(constant * q + (1 - constant) * p, _TINY)
        return p * (-(1 - constant) * q / m - second)
    elif CODE == 5:
        m = tl.maximum(constant * p + (1 - constant) * q, _TINY)
        return p * (z - ls - tl.log(m) + 1 - constant * p / m - second)
    else:
        sign = tl.where(p > q, 1.0, tl.where(p < q, -1.0, 0.0))
        total_variation = 0.5 * p * (sign - second)
        return total_variation if CODE == 3 else share * (p - q) + (1 - share) * total_variation


@triton.jit
def _row(  # type: ignore[no-untyped-def]
    student, teacher, rounded, ids, factors, stats, n, size, inverse, constant,
    CODE: tl.constexpr, GRAD: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    ours, theirs = student + r * size, teacher + r * size
    top, ss = _normaliser(ours, size, inverse, BLOCK)
    top_t, st = _normaliser(theirs, size, inverse, BLOCK)
    ls, lt = tl.log(ss), tl.log(st)
    firsts, seconds = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    thirds, weighted = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z, t = _scaled(ours, at, size, inverse, top), _scaled(theirs, at, size, inverse, top_t)
        p, q = tl.exp(z) / ss, tl.exp(t) / st
        a, b, c = _terms(CODE, constant, z, t, p, q, ls, lt)
        firsts += a
        seconds += b
        thirds += c
        weighted += p * z
    first, second, third = tl.sum(firsts, 0), tl.sum(seconds, 0), tl.sum(thirds, 0)
    share = tl.exp(-constant * (1 - 0.5 * first))
    value = first
    if CODE == 2:
        value = constant * first + (1 - constant) * second
    elif CODE == 3:
        value = 0.5 * first
    elif CODE == 6:
        kl = tl.where(third > _INFINITE, float("inf"), third)
        value = share * kl + (1 - share) * 0.5 * first
    value = tl.where(value > _INFINITE, float("inf"), value)
    value = tl.where((ss != ss) | (st != st), float("nan"), value)
    tl.store(stats + r, value)
    tl.store(stats + n + r, ls - tl.sum(weighted, 0))
    place = tl.load(ids + r)
    if place >= 0:
        z, t = (tl.load(ours + place) - top) * inverse, (tl.load(theirs + place) - top_t) * inverse
        tl.store(stats + 2 * n + r, z - ls)
        tl.store(stats + 3 * n + r, t - lt)
    if GRAD:
        factor = tl.load(factors + r)
        for start in range(0, size, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z, t = _scaled(ours, at, size, inverse, top), _scaled(theirs, at, size, inverse, top_t)
            p, q = tl.exp(z) / ss, tl.exp(t) / st
            slope = factor * _slope(CODE, constant, first, second, share, z, t, p, q, ls, lt)
            tl.store(ours + at, slope, mask=at < size)
            if ROUNDED:
                tl.store(rounded + r * size + at, slope.to(rounded.dtype.element_ty), mask=at < size)


def rows(
    code: int,
    parameter: float,
    inverse: float,  # 1 / temperature
    grad: bool,
    student: Tensor,  # [n, V] float32, contiguous
    teacher: Tensor,  # [n, V] float32, contiguous
    rounded: Tensor | None,  # [n, V] 16 bits
    ids: Tensor,  # [n] int64, -1 for none
    factors: Tensor,  # [n] float32
    stats: Tensor,  # [4, n] float32: value, entropy, log-probabilities of student and teacher
) -> None:
    """Statistics into ``stats``, gradient times factor into ``student`` and ``rounded``."""
    n, size = student.shape
    arguments: tuple[Any, ...] = (student, teacher, student if rounded is None else rounded, ids, factors, stats)
    with torch.cuda.device_of(student):  # nothing without a GPU, where Triton's interpreter runs it
        _row[(n,)](
            *arguments, n, size, inverse, parameter,
            CODE=code, GRAD=grad, ROUNDED=rounded is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
