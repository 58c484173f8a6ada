"""Verification compiled for CPUs. Each decision reads only the rows it needs; sums are float64.

Shapes as in :mod:`spec.verify.block`: target [N, V], draft [Q, V], ids and rows [M], lengths [B]. Imported only
where it runs.
"""

from __future__ import annotations

import numba
import numpy as np

from spec.compiled import REPRODUCIBLE

_jit = numba.njit(cache=True, nogil=True)
_sum = numba.njit(**REPRODUCIBLE, fastmath={"reassoc", "nsz"})  # lets float sums vectorise
_CHUNK = 512


@_jit
def decide(target, draft, ids, rows, lengths, block, accept_u, last_u, accept, accepted, tokens):  # type: ignore[no-untyped-def]
    """Fills accept [M], accepted [B], tokens [B] from uniforms accept_u [M], last_u [N]."""
    scratch = np.empty(target.shape[1])
    weights = np.empty(lengths.max() + 1 if len(lengths) else 1)
    at = 0
    for b in range(len(lengths)):
        size = lengths[b]
        own = target[at + b : at + b + size + 1]
        request_accept(own, draft, ids[at : at + size], rows[at : at + size], block, weights, accept[at : at + size])
        tau = 0
        for i in range(size):
            if accept_u[at + i] < accept[at + i]:
                tau = i + 1
            elif not block:
                break
        accepted[b] = tau
        last_weights(
            own, draft, ids[at : at + size], rows[at : at + size], tau, weights[tau] if block else 1.0, scratch
        )
        tokens[b] = inverse_cdf(scratch, last_u[at + b + tau])
        at += size


@_jit
def expose(target, draft, ids, rows, lengths, block, accept, last):  # type: ignore[no-untyped-def]
    """Fills accept [M] and last [N, V], the normalised law of the last token after each number accepted."""
    weights = np.empty(lengths.max() + 1 if len(lengths) else 1)
    at = 0
    for b in range(len(lengths)):
        size = lengths[b]
        own = target[at + b : at + b + size + 1]
        request_accept(own, draft, ids[at : at + size], rows[at : at + size], block, weights, accept[at : at + size])
        for tau in range(size + 1):
            row = last[at + b + tau]
            weight = weights[tau] if block else 1.0
            last_weights(own, draft, ids[at : at + size], rows[at : at + size], tau, weight, row)
            row /= row.sum()
        at += size


@_jit
def sample_rows(probs, uniforms, tokens):  # type: ignore[no-untyped-def]
    """tokens [N] from probs [N, V] and uniforms [N]."""
    for row in range(len(probs)):
        tokens[row] = inverse_cdf(probs[row], uniforms[row])


@_jit
def request_accept(target, draft, ids, rows, block, weights, accept):  # type: ignore[no-untyped-def]
    """Acceptance probabilities of one request into accept [K]; in block mode also weights w_0..w_K."""
    size = len(ids)
    weights[0] = 1.0
    for i in range(size):
        p = np.float64(target[i, ids[i]])
        q = np.float64(draft[rows[i], ids[i]]) if rows[i] >= 0 else 1.0
        ratio = p / q if q > 0 else (1.0 if p > 0 else 0.0)
        weights[i + 1] = min(1.0, weights[i] * ratio if block else ratio)
        accept[i] = weights[i + 1]
    if not block:
        return
    for i in range(1, size):
        if rows[i] >= 0:
            surplus = surplus_mass(target[i], draft[rows[i]], weights[i])
        else:
            surplus = weights[i] * (row_sum(target[i]) - np.float64(target[i, ids[i]]))
        short = surplus + 1.0 - weights[i]
        accept[i - 1] = surplus / short if short > 0 else 1.0


@_sum
def surplus_mass(p, q, weight):  # type: ignore[no-untyped-def]
    """sum_x max(weight p(x) - q(x), 0)."""
    mass = 0.0
    for x in range(len(p)):
        mass += max(weight * np.float64(p[x]) - np.float64(q[x]), 0.0)
    return mass


@_sum
def row_sum(p):  # type: ignore[no-untyped-def]
    mass = 0.0
    for x in range(len(p)):
        mass += np.float64(p[x])
    return mass


@_jit
def last_weights(target, draft, ids, rows, tau, weight, out):  # type: ignore[no-untyped-def]
    """The law of the token after ``tau`` accepted ones into out [V], unnormalised."""
    p = target[tau]
    if tau < len(ids):
        if rows[tau] >= 0:
            q = draft[rows[tau]]
            for x in range(len(p)):
                out[x] = max(weight * np.float64(p[x]) - np.float64(q[x]), 0.0)
        else:
            for x in range(len(p)):
                out[x] = weight * np.float64(p[x])
            out[ids[tau]] = 0.0  # weight p(x) - 1 is never positive
        if row_sum(out) > 0:
            return
    for x in range(len(p)):  # the bonus, or a residual that rounding emptied
        out[x] = p[x]


@_jit
def inverse_cdf(law, uniform):  # type: ignore[no-untyped-def]
    """The first token whose cumulated mass exceeds ``uniform`` of the total: never one without mass."""
    size = len(law)
    chunks = (size + _CHUNK - 1) // _CHUNK
    sums = np.empty(chunks)
    for c in range(chunks):
        sums[c] = row_sum(law[c * _CHUNK : (c + 1) * _CHUNK])
    goal = uniform * sums.sum()
    before = 0.0
    fallback = 0
    for c in range(chunks):
        if before + sums[c] > goal or c == chunks - 1:
            running = before
            for x in range(c * _CHUNK, min((c + 1) * _CHUNK, size)):
                if law[x] > 0:
                    running += law[x]
                    fallback = x
                    if running > goal:
                        return x
        elif sums[c] > 0:
            fallback = (c + 1) * _CHUNK - 1  # refined below if it is ever returned
        before += sums[c]
    while fallback > 0 and law[fallback] <= 0:
        fallback -= 1
    return fallback
