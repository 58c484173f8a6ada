"""What lies between the matrix products of a decoder, for CPUs, compiled by numba. Imported only where it runs.

16-bit floats (bf16) are handed over as their bits, int16. Every row's result is computed in an order that does not
depend on the other rows of the step, so a sequence gets the same bits alone and in any batch.

Keys are kept in blocks of 16 positions with the positions innermost, [K, P / 16, D, 16]: one vector register holds one
coordinate of 16 keys, so scores need no horizontal sums. Values are kept as [K, P, D].

One file on purpose: numba's disk cache notices a change of the file a kernel is in, not of what it calls elsewhere.

Shape legend: T rows (tokens) of a step, B sequences, H heads, K key heads, G = H / K, D head size, P positions of the
cache, C width of the residual stream, F width of the MLP.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from spec import threads
from spec.compiled import REPRODUCIBLE

threads.launch()

f32: Any = np.float32
i32: Any = np.int32
u32: Any = np.uint32
BLOCK = 16  # positions of a block of keys
ROWS = 16  # of one sequence, that share the conversion of a block of keys or values
_MATH = {"contract", "nsz", "arcp"}  # no "reassoc": sums keep their order
_jit = numba.njit(**REPRODUCIBLE, fastmath=_MATH)
_jit_parallel = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_MATH, parallel=True)
_inline = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=_MATH, inline="always")


@_inline
def _wide(bits: Any) -> Any:
    """bf16 bits -> float32."""
    return i32(i32(bits) << i32(16)).view(f32)


@_inline
def _narrow(x: Any) -> Any:
    """float32 -> bf16 bits, to nearest, ties to even. NaN stays NaN."""
    bits = f32(x).view(i32)
    rounded = (bits + i32(0x7FFF) + ((bits >> i32(16)) & i32(1))) >> i32(16)
    return np.int16(rounded if x == x else i32(0x7FC0))


@_inline
def _exp(x: Any) -> Any:
    """exp for x <= 0, relative error about 1e-7 (Cephes' polynomial); 0 below -87."""
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


@_inline
def _mean_square(x: Any) -> Any:
    """Of one row, in 16 running sums."""
    sums = np.zeros(16, np.float32)
    whole = x.size // 16 * 16
    for start in range(0, whole, 16):
        for i in range(16):
            sums[i] += x[start + i] * x[start + i]
    total = f32(0.0)
    for i in range(16):
        total += sums[i]
    for i in range(whole, x.size):
        total += x[i] * x[i]
    return total / f32(x.size)


@_inline
def _silu_mul_row(gate_up, out):  # type: ignore[no-untyped-def]
    gate, up = gate_up[: out.size], gate_up[out.size :]
    for c in range(out.size):
        x = _wide(gate[c])
        decay = _exp(-abs(x))
        sigmoid = (f32(1.0) if x >= 0 else decay) / (f32(1.0) + decay)
        out[c] = _narrow(x * sigmoid * _wide(up[c]))


@_inline
def _rotated(source, norm, epsilon, cos, sin, out):  # type: ignore[no-untyped-def]
    """out [D] float32 = one head of ``source`` [D] bf16: normed where the model does, then rotated by its position."""
    size = source.size
    half = size // 2
    for d in range(size):
        out[d] = _wide(source[d])
    if norm.size > 0:
        scale = f32(1.0) / np.sqrt(_mean_square(out) + epsilon)
        for d in range(size):
            out[d] *= scale * norm[d]
    for d in range(half):
        first, second = out[d], out[d + half]
        out[d] = first * cos[d] - second * sin[d]
        out[d + half] = second * cos[d + half] + first * sin[d + half]


@_jit
def _attend_unit(  # type: ignore[no-untyped-def]
    job, qkv, positions, firsts, units, cos, sin, norm, epsilon, scale, all_keys, all_values, out
):
    """One run of rows and one key head with the query heads that share it."""
    unit, k = job // len(all_values), job % len(all_values)
    start, rows, first = units[unit, 0], units[unit, 1], firsts[units[unit, 0]]
    keys, values = all_keys[k], all_values[k]
    group = out.shape[1] // values.shape[1] // len(all_values)
    head = k * group
    size = values.shape[1]
    queries = np.empty((rows * group, size), np.float32)
    for r in range(rows):
        at = positions[start + r]
        for g in range(group):
            begin = (head + g) * size
            query = queries[r * group + g]
            _rotated(qkv[start + r, begin : begin + size], norm, epsilon, cos[at], sin[at], query)
            for d in range(size):
                query[d] *= scale
    seen = positions[start + rows - 1] + 1  # rows are consecutive positions: the last sees most
    blocks = (seen + BLOCK - 1) // BLOCK
    scores = np.empty((rows * group, blocks * BLOCK), np.float32)
    _scores(queries, keys[first // BLOCK : first // BLOCK + blocks], scores)
    sums = np.empty(rows * group, np.float32)
    for i in range(rows * group):
        sums[i] = _exponentials(scores[i], positions[start + i // group] + 1)
    mixed = np.empty((rows * group, size), np.float32)
    _mix(scores, values[first : first + seen], mixed)
    for i in range(rows * group):
        begin = (head + i % group) * size
        row, inverse = out[start + i // group, begin : begin + size], f32(1.0) / sums[i]
        for d in range(size):
            row[d] = _narrow(mixed[i, d] * inverse)


@_jit
def _scores(queries, keys, scores):  # type: ignore[no-untyped-def]
    """scores [R, blocks * 16] = queries [R, D] @ keys [blocks, D, 16]. D is a multiple of 8."""
    size = queries.shape[1]
    wide = np.empty((size, BLOCK), np.float32)
    for b in range(len(keys)):
        block = keys[b]
        for d in range(size):
            source, target = block[d], wide[d]
            for i in range(BLOCK):
                target[i] = _wide(source[i])
        for r in range(len(queries)):
            _weigh(queries[r], wide, scores[r, b * BLOCK : (b + 1) * BLOCK])


@_jit
def _exponentials(row, seen):  # type: ignore[no-untyped-def]
    """row[:seen] = exp(row - max), the rest 0; their sum."""
    top = row[0]
    for j in range(seen):
        top = max(top, row[j])
    for j in range(seen):
        row[j] = _exp(row[j] - top)
    for j in range(seen, row.size):
        row[j] = f32(0.0)
    sums = np.zeros(BLOCK, np.float32)
    for start in range(0, row.size, BLOCK):
        for i in range(BLOCK):
            sums[i] += row[start + i]
    total = f32(0.0)
    for i in range(BLOCK):
        total += sums[i]
    return total


@_jit
def _mix(weights, values, out):  # type: ignore[no-untyped-def]
    """out [R, D] = weights[:, :n] @ values [n, D] bf16, position after position; weights beyond n are 0."""
    size = out.shape[1]
    wide, part = np.empty((BLOCK, size), np.float32), np.empty(size, np.float32)
    out[:] = f32(0.0)
    for start in range(0, len(values), BLOCK):
        for j in range(BLOCK):
            target = wide[j]
            if start + j < len(values):
                source = values[start + j]
                for d in range(size):
                    target[d] = _wide(source[d])
            else:  # what another sequence left there may be NaN, and 0 * NaN is not 0
                for d in range(size):
                    target[d] = f32(0.0)
        for r in range(len(out)):
            _weigh(weights[r, start : start + BLOCK], wide, part)
            row = out[r]
            for d in range(size):
                row[d] += part[d]


@_inline
def _weigh(weights, rows, out):  # type: ignore[no-untyped-def]
    """out [I] = weights [J] @ rows [J, I], J a multiple of 8. Eight rows at a time: the sums stay in registers."""
    for i in range(out.size):
        out[i] = f32(0.0)
    for j in range(0, weights.size, 8):
        w, r = weights[j : j + 8], rows[j : j + 8]
        w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
        r0, r1, r2, r3, r4, r5, r6, r7 = r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7]
        for i in range(out.size):
            low = w0 * r0[i] + w1 * r1[i] + w2 * r2[i] + w3 * r3[i]
            high = w4 * r4[i] + w5 * r5[i] + w6 * r6[i] + w7 * r7[i]
            out[i] += low + high


@_jit
def embed(ids, table, residual):  # type: ignore[no-untyped-def]
    """residual [T, C] float32 = rows ``ids`` [T] of ``table`` [V, C] bf16."""
    for t in range(len(ids)):
        source, row = table[ids[t]], residual[t]
        for c in range(row.size):
            row[c] = _wide(source[c])


@_jit
def add_norm(residual, delta, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """residual [T, C] += delta [T, C] (or nothing where delta has no rows); out bf16 = RMS norm of it, times weight."""
    for t in range(len(residual)):
        row = residual[t]
        if len(delta) > 0:
            change = delta[t]
            for c in range(row.size):
                row[c] += _wide(change[c])
        scale = f32(1.0) / np.sqrt(_mean_square(row) + epsilon)
        normed = out[t]
        for c in range(row.size):
            normed[c] = _narrow(row[c] * scale * weight[c])


@_jit
def silu_mul(gate_up, out):  # type: ignore[no-untyped-def]
    """out [T, F] = silu(gate) * up, of gate_up [T, 2 F], all bf16."""
    for t in range(len(out)):
        _silu_mul_row(gate_up[t], out[t])


@_jit_parallel
def silu_mul_parallel(gate_up, out):  # type: ignore[no-untyped-def]
    """The same on several threads."""
    for t in numba.prange(len(out)):
        _silu_mul_row(gate_up[t], out[t])


@_jit
def store(qkv, positions, places, cos, sin, key_norm, epsilon, heads, keys, values):  # type: ignore[no-untyped-def]
    """Keys, rotated, and values of all rows into the cache.

    qkv [T, (H + 2 K) D] bf16; positions [T] in the sequence; places [T] in the cache; cos, sin [positions, D] float32;
    key_norm [D] or []; keys [K, P / 16, D, 16] and values [K, P, D] bf16.
    """
    shared, size = values.shape[0], values.shape[2]
    rotated = np.empty(size, np.float32)
    for t in range(len(qkv)):
        at, place = positions[t], places[t]
        for k in range(shared):
            start = (heads + k) * size
            _rotated(qkv[t, start : start + size], key_norm, epsilon, cos[at], sin[at], rotated)
            block, lane = keys[k, place // BLOCK], place % BLOCK
            for d in range(size):
                block[d, lane] = _narrow(rotated[d])
            start = (heads + shared + k) * size
            value, source = values[k, place], qkv[t, start : start + size]
            for d in range(size):
                value[d] = source[d]


@_jit
def attend(qkv, positions, firsts, units, cos, sin, query_norm, epsilon, scale, keys, values, out):  # type: ignore[no-untyped-def]
    """out [T, H D] bf16: softmax attention of every row to the positions of its sequence up to its own.

    units [U, 2]: first row and number of rows (at most 16) of a run of rows of one sequence; firsts [T]: where a row's
    sequence starts in the cache, a multiple of 16. The rest as in :func:`store`.
    """
    for job in range(len(units) * len(values)):
        _attend_unit(
            job, qkv, positions, firsts, units, cos, sin, query_norm, epsilon, scale, keys, values, out
        )  # fmt: skip


@_jit_parallel
def attend_parallel(qkv, positions, firsts, units, cos, sin, query_norm, epsilon, scale, keys, values, out):  # type: ignore[no-untyped-def]
    """The same on several threads."""
    for job in numba.prange(len(units) * len(values)):
        _attend_unit(
            job, qkv, positions, firsts, units, cos, sin, query_norm, epsilon, scale, keys, values, out
        )  # fmt: skip
