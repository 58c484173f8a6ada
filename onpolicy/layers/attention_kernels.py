"""Causal attention compiled by numba: both its passes whole, and the softmax and its gradient alone.

bf16 values are handed over as their bits: int16, or words of two where they are multiplied
(:mod:`onpolicy.bf16_block`). One file on purpose: numba's disk cache notices a change of the file a kernel is in, not
of what it calls elsewhere.

Shape legend: S sequences, H heads, K key heads, G = H / K, M positions, P pairs of a head; B = S * K, R = G * M queries
(G heads under one another).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from onpolicy.bf16_block import HEIGHT, LANES, WIDTH, added_product, product, transpose
from onpolicy.kernel_math import MATH, exp, f32, i32, to_bf16
from spec import threads
from spec.compiled import REPRODUCIBLE

threads.launch()

u32: Any = np.uint32
_parallel = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=MATH, parallel=True)
_jit = numba.njit(**REPRODUCIBLE, fastmath=MATH)


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
            e = exp(scale * (row[j] - top))
            row[j] = e
            total += e
        inverse = f32(1.0) / total
        for j in range(row.size):
            out[j] = to_bf16(row[j] * inverse)
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
            p = exp(scale * row[j] - normaliser)
            out[j] = to_bf16(p)
            slope[j] = to_bf16(p * (change[j] - mean) * scale)
        rest, flat = probs[b, r, seen:], d_scores[b, r, seen:]
        for j in range(rest.size):
            rest[j] = 0
            flat[j] = 0


@_jit
def _pack_keys(key, keys):  # type: ignore[no-untyped-def]
    """Words [M, P] of one key head, ``key[m]`` contiguous -> panels [ceil(M / 32), P, 32], filled up with zeros."""
    positions, pairs = key.shape
    flat, square = keys.reshape(-1), np.empty((WIDTH, pairs), np.uint32)
    for panel in range(keys.shape[0]):
        first = panel * WIDTH
        for j in range(WIDTH):
            row, to = key[min(first + j, positions - 1)], square[j]
            keep = u32(0xFFFFFFFF) if first + j < positions else u32(0)
            for p in range(pairs):  # numba's assignment of slices takes several times as long
                to[p] = row[p] & keep
        words, whole = square.reshape(-1), pairs // LANES * LANES
        for k in range(0, whole, LANES):
            for half in range(0, WIDTH, LANES):
                transpose(words, half * pairs + k, pairs, flat, (panel * pairs + k) * WIDTH + half, WIDTH)
        for k in range(whole, pairs):
            for j in range(WIDTH):
                keys[panel, k, j] = square[j, k]


@_jit
def _pack_values(value, values):  # type: ignore[no-untyped-def]
    """Words [M, P] of one key head -> panels [ceil(2 P / 32), ceil(M / 2), 32] of pairs along the positions."""
    positions, half = len(value), WIDTH // 2
    for m in range(values.shape[1]):
        lower, upper = value[2 * m], value[min(2 * m + 1, positions - 1)]
        keep = u32(0xFFFFFFFF) if 2 * m + 1 < positions else u32(0)
        for panel in range(len(values)):
            low, high, to = lower[panel * half :], upper[panel * half :], values[panel, m]
            for p in range(min(half, low.size)):
                to[2 * p] = (low[p] & u32(0xFFFF)) | ((high[p] & keep) << u32(16))
                to[2 * p + 1] = (low[p] >> u32(16)) | (high[p] & keep & u32(0xFFFF0000))


@_jit
def _softmax_row(row, seen, scale, out):  # type: ignore[no-untyped-def]
    """``out`` bf16 bits = softmax of the first ``seen`` of scale * ``row`` [N] (overwritten), 0 beyond; N % 32 == 0.

    Returns the log of the sum of exponentials. Everything runs over the whole row: what is left over of a vectorised
    loop is computed one by one, which takes longer than all the rest of rows this short.
    """
    for j in range(seen, row.size):
        row[j] = f32(-3e38)
    words = row.view(np.int32)
    top = i32(-(2**31) + 1)
    for j in range(words.size):  # over integers ordered like the floats: a maximum of floats does not vectorise
        word = words[j]
        top = max(top, word ^ ((word >> i32(31)) & i32(0x7FFFFFFF)))
    highest = i32(top ^ ((top >> i32(31)) & i32(0x7FFFFFFF))).view(f32)
    total = f32(0.0)
    for j in range(row.size):
        e = exp(scale * (row[j] - highest))
        row[j] = e
        total += e
    inverse = f32(1.0) / total
    for j in range(row.size):
        out[j] = to_bf16(row[j] * inverse)
    return scale * highest + np.log(total)


@_jit
def _attend(first, last, query, key, value, scale, spans, out, normalisers):  # type: ignore[no-untyped-def]
    """softmax(scale * query @ key.T, causal) @ value, of the key heads ``first`` to ``last`` of all S * K.

    query, key, value: words [S, M, H or K, P]. spans: [S, 2], the positions whose results are needed. out: bf16 bits
    [S, M, H, 2 P]. normalisers: [S, K, R] float32, as of :func:`softmax`. Scores are float32, and probabilities bf16
    where they meet the values. A block of 12 queries multiplies the keys that its last query sees, so half of the
    products of all pairs is left out.
    """
    _, positions, heads, pairs = query.shape
    shared = key.shape[2]
    group = heads // shared
    keys = np.empty((-(-positions // WIDTH), pairs, WIDTH), np.uint32)
    values = np.zeros((-(-2 * pairs // WIDTH), -(-positions // 2), WIDTH), np.uint32)
    key_words, value_words, halves = keys.reshape(-1), values.reshape(-1), values.shape[1]
    queries, scores = np.zeros((HEIGHT, pairs), np.uint32), np.empty((HEIGHT, len(keys) * WIDTH), np.float32)
    probs = np.zeros(scores.shape, np.int16)
    left, score_words, prob_words = query.reshape(-1), scores.reshape(-1), probs.reshape(-1).view(np.uint32)
    last_rows = queries.reshape(-1)
    stride = scores.shape[1]
    block = np.empty((HEIGHT, WIDTH), np.float32)
    flat = block.reshape(-1)
    for job in range(first, last):
        s, h = job // shared, job % shared
        _pack_keys(key[s, :, h], keys)
        _pack_values(value[s, :, h], values)
        begin, stop = spans[s, 0] // HEIGHT * HEIGHT, spans[s, 1]
        for g in range(group):
            head = h * group + g
            for start in range(begin, stop, HEIGHT):
                rows = min(HEIGHT, positions - start)
                if rows < HEIGHT:  # 12 are read
                    for i in range(rows):
                        queries[i] = query[s, start + i, head]
                end = start + rows
                reach = -(-end // WIDTH) * WIDTH
                for panel in range(reach // WIDTH):
                    to, at = panel * WIDTH, panel * pairs * WIDTH
                    if rows < HEIGHT:
                        product(last_rows, 0, pairs, 1, key_words, at, pairs, score_words, to, stride)
                    else:
                        at_row = ((s * positions + start) * heads + head) * pairs
                        product(left, at_row, heads * pairs, 1, key_words, at, pairs, score_words, to, stride)
                for i in range(rows):
                    normaliser = _softmax_row(scores[i, :reach], start + i + 1, scale, probs[i, :reach])
                    normalisers[s, h, g * positions + start + i] = normaliser
                for panel in range(len(values)):
                    product(
                        prob_words, 0, stride // 2, 1, value_words, panel * halves * WIDTH, -(-end // 2), flat, 0, WIDTH
                    )
                    width = min(WIDTH, 2 * pairs - panel * WIDTH)
                    for i in range(rows):
                        result, sums = out[s, start + i, head, panel * WIDTH :], block[i]
                        for j in range(width):
                            result[j] = to_bf16(sums[j])


@_parallel
def attend(parts, query, key, value, scale, spans, out, normalisers):  # type: ignore[no-untyped-def]
    """All key heads of all sequences, see :func:`_attend`, on ``parts`` threads."""
    count = len(query) * key.shape[2]
    for part in numba.prange(parts):
        _attend(count * part // parts, count * (part + 1) // parts, query, key, value, scale, spans, out, normalisers)


@_jit
def _slope_row(row, change, seen, normaliser, grad, out, scale, probs, slopes):  # type: ignore[no-untyped-def]
    """The first ``seen`` probabilities of ``row`` [N] again, and the gradient by the scores, 0 beyond; N % 32 == 0.

    P * (dP - sum dO * O) * scale (Dao et al. 2205.14135, appendix B), both as bf16 bits. ``row`` is overwritten;
    ``change``: dP [N]; ``grad`` and ``out``: bf16 bits [D] of one head and position.
    """
    inner = f32(0.0)
    for d in range(grad.size):
        inner += i32(i32(grad[d]) << i32(16)).view(f32) * i32(i32(out[d]) << i32(16)).view(f32)
    for j in range(seen, row.size):
        row[j] = f32(-1e30)
    for j in range(row.size):
        p = exp(scale * row[j] - normaliser)
        probs[j] = to_bf16(p)
        slopes[j] = to_bf16(p * (change[j] - inner) * scale)


@_jit
def _pair_up(rows, words):  # type: ignore[no-untyped-def]
    """bf16 bits [12, N] -> words [6, N]: pairs of rows."""
    for k in range(HEIGHT // 2):
        low, high, to = rows[2 * k], rows[2 * k + 1], words[k]
        for j in range(low.size):
            to[j] = (u32(low[j]) & u32(0xFFFF)) | (u32(high[j]) << u32(16))


@_jit
def _copy_narrow(sums, out, at):  # type: ignore[no-untyped-def]
    """Columns of ``sums`` [n, N] float32 -> ``out`` bf16 bits [n, D], from column ``at`` on, as many as there are."""
    for i in range(len(out)):
        row, to = sums[i], out[i, at:]
        for j in range(min(row.size, to.size)):
            to[j] = to_bf16(row[j])


@_jit
def _attend_backward(  # type: ignore[no-untyped-def]
    first, last, query, key, value, grad, bits, out, normalisers, scale, spans, d_query, d_key, d_value
):
    """Gradients by query, key and value, of the key heads ``first`` to ``last`` of all S * K.

    query, key, value, grad (by the output): words, as of :func:`_attend`. bits, out: ``grad`` and the output as
    bf16 bits [S, M, H, D], which are not read outside the spans. d_query, d_key, d_value: bf16 bits [S, M, H or K, D].
    Scores and probabilities are computed again for 12 queries at a time; those of all queries of a head then stand in
    pairs for the sums over queries.
    """
    _, positions, heads, pairs = query.shape
    shared, size = key.shape[2], 2 * pairs
    group, sides, halves = heads // shared, -(-size // WIDTH), -(-positions // 2)
    panels, blocks = -(-positions // WIDTH), -(-positions // HEIGHT)
    stride = (panels + 1) * WIDTH  # the last 12 keys are read beyond the last panel
    keys, values = np.empty((panels, pairs, WIDTH), np.uint32), np.empty((panels, pairs, WIDTH), np.uint32)
    key_rows, query_rows = np.zeros((sides, halves, WIDTH), np.uint32), np.zeros((sides, halves, WIDTH), np.uint32)
    grad_rows, queries = np.zeros((sides, halves, WIDTH), np.uint32), np.zeros((HEIGHT, pairs), np.uint32)
    grads, block = np.zeros((HEIGHT, pairs), np.uint32), np.empty((HEIGHT, WIDTH), np.float32)
    scores, changes = np.empty((HEIGHT, stride), np.float32), np.empty((HEIGHT, stride), np.float32)
    probs, slopes = np.zeros((HEIGHT, stride), np.int16), np.zeros((HEIGHT, stride), np.int16)
    prob_pairs, slope_pairs = (
        np.zeros((blocks * HEIGHT // 2, stride), np.uint32),
        np.zeros((blocks * HEIGHT // 2, stride), np.uint32),
    )
    d_keys, d_values = (
        np.empty((blocks * HEIGHT, sides * WIDTH), np.float32),
        np.empty((blocks * HEIGHT, sides * WIDTH), np.float32),
    )
    slope_words, flat = slopes.reshape(-1).view(np.uint32), block.reshape(-1)
    for job in range(first, last):
        s, h = job // shared, job % shared
        _pack_keys(key[s, :, h], keys)
        _pack_keys(value[s, :, h], values)
        _pack_values(key[s, :, h], key_rows)
        d_keys[:] = 0
        d_values[:] = 0
        begin, stop = spans[s, 0] // HEIGHT * HEIGHT, spans[s, 1]
        stop = min(begin + -(-(stop - begin) // HEIGHT) * HEIGHT, positions)
        for g in range(group):
            head = h * group + g
            d_query[s, :begin, head] = 0
            d_query[s, stop:, head] = 0
            _pack_values(query[s, :, head], query_rows)
            _pack_values(grad[s, :, head], grad_rows)
            for start in range(begin, stop, HEIGHT):
                rows = min(HEIGHT, positions - start)
                end = start + rows
                reach = -(-end // WIDTH) * WIDTH
                for i in range(rows):
                    to_q, from_q, to_g, from_g = (
                        queries[i],
                        query[s, start + i, head],
                        grads[i],
                        grad[s, start + i, head],
                    )
                    for k in range(pairs):
                        to_q[k] = from_q[k]
                        to_g[k] = from_g[k]
                for panel in range(reach // WIDTH):
                    to, at = panel * WIDTH, panel * pairs * WIDTH
                    product(
                        queries.reshape(-1), 0, pairs, 1, keys.reshape(-1), at, pairs, scores.reshape(-1), to, stride
                    )
                    product(
                        grads.reshape(-1), 0, pairs, 1, values.reshape(-1), at, pairs, changes.reshape(-1), to, stride
                    )
                for i in range(rows):
                    m = start + i
                    _slope_row(
                        scores[i, :reach], changes[i, :reach], m + 1, normalisers[s, h, g * positions + m],
                        bits[s, m, head], out[s, m, head], scale, probs[i, :reach], slopes[i, :reach],
                    )  # fmt: skip
                for i in range(rows, HEIGHT):
                    probs[i] = 0
                    slopes[i] = 0
                _pair_up(probs[:, :reach], prob_pairs[start // 2 :, :reach])
                _pair_up(slopes[:, :reach], slope_pairs[start // 2 :, :reach])
                for side in range(sides):
                    at = side * halves * WIDTH
                    product(slope_words, 0, stride // 2, 1, key_rows.reshape(-1), at, -(-end // 2), flat, 0, WIDTH)
                    _copy_narrow(block, d_query[s, start:end, head], side * WIDTH)
            for start in range(0, stop, HEIGHT):  # keys, seen by the queries from there on
                pair = max(start, begin) // 2
                left, count = pair * stride + start, -(-stop // 2) - pair
                for side in range(sides):
                    at, to = (side * halves + pair) * WIDTH, start * sides * WIDTH + side * WIDTH
                    added_product(
                        prob_pairs.reshape(-1), left, 1, stride, grad_rows.reshape(-1), at, count,
                        d_values.reshape(-1), to, sides * WIDTH,
                    )  # fmt: skip
                    added_product(
                        slope_pairs.reshape(-1), left, 1, stride, query_rows.reshape(-1), at, count,
                        d_keys.reshape(-1), to, sides * WIDTH,
                    )  # fmt: skip
        _copy_narrow(d_keys, d_key[s, :, h], 0)
        _copy_narrow(d_values, d_value[s, :, h], 0)


@_parallel
def attend_backward(  # type: ignore[no-untyped-def]
    parts, query, key, value, grad, bits, out, normalisers, scale, spans, d_query, d_key, d_value
):
    """All key heads of all sequences, see :func:`_attend_backward`, on ``parts`` threads."""
    count = len(query) * key.shape[2]
    for part in numba.prange(parts):
        first, last = count * part // parts, count * (part + 1) // parts
        _attend_backward(
            first, last, query, key, value, grad, bits, out, normalisers, scale, spans, d_query, d_key, d_value
        )
