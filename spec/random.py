"""Counter-based random streams: a draw is a pure function of what it is for.

Every uniform is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) of

- key: the request's 64-bit seed;
- counter: (position, round, purpose, lane), 32 bits each.

So a seed gives the same text whatever else is in the batch, in whatever order requests run, and two purposes never
share a draw. *Position* is the index of the token in the request's output, 0 for the first. *Round* counts the
request's verification steps and enters DRAFT and ACCEPT draws only: a rejected suffix is drafted anew at the same
positions, and block verification (and an adaptive draft length) has by then looked at the old draws, so using them
again would bias the text. A RESIDUAL, BONUS or TARGET draw commits its position and so happens once per position;
those use round 0. Plain decoding, and a verification step with no draft, use the TARGET stream: both give the same
text for the same seed.

One definition serves Python integers, numpy, torch (any device) and numba: every intermediate fits in, or wraps
harmlessly in, 64-bit signed integers.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_MASK = 0xFFFFFFFF


class Purpose(enum.IntEnum):
    """What a draw is for; the numbers are part of every seed's meaning and must not change."""

    DRAFT = 1  # the draft's own sampling
    ACCEPT = 2  # accept or reject a drafted token
    RESIDUAL = 3  # the token in place of the first rejected one
    BONUS = 4  # the token after a fully accepted draft
    TARGET = 5  # plain decoding


def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10: four counter words and two key words of 32 bits, held in 64, to four random words."""
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK, ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: Any, purpose: Any, position: Any, round: Any = 0, lane: Any = 0) -> Any:
    """The draw in [0, 1), a multiple of 2^-53. Integers, or int64 arrays or tensors that broadcast: elementwise.

    Results are Python floats, float64 arrays or float64 tensors on the arguments' device, bit for bit the same.
    """
    high, low, _, _ = philox(
        position & _MASK, round & _MASK, purpose & _MASK, lane & _MASK, seed & _MASK, (seed >> 32) & _MASK
    )
    bits = (high << 21) | (low >> 11)
    return (bits.double() if hasattr(bits, "double") else bits) * 2.0**-53  # a tensor would become float32


@dataclass(frozen=True)
class BlockUniforms:
    """All noise one verification step needs, ragged like the drafts: B requests, M drafted tokens, N = M + B rows."""

    accept: np.ndarray  # [M] float64
    last: np.ndarray  # [N] float64: residual draws, and in each request's last row the bonus (or target) draw


def as_seeds(seeds: Sequence[int] | np.ndarray) -> np.ndarray:
    """[B] int64 with the low 64 bits of each seed."""
    if isinstance(seeds, np.ndarray):
        return seeds.astype(np.int64)
    return np.array([int(seed) & (2**64 - 1) for seed in seeds], dtype=np.uint64).view(np.int64)


def uniforms(
    seeds: Sequence[int] | np.ndarray,
    purpose: Purpose,
    positions: Sequence[int] | np.ndarray,
    rounds: Sequence[int] | np.ndarray | int = 0,
) -> np.ndarray:
    """One draw a request, [B] float64. ``seeds``, ``positions`` [B]; ``rounds`` [B] or one number."""
    from spec.random_numba import fill

    seeds, positions = as_seeds(seeds), np.asarray(positions, dtype=np.int64)
    if seeds.shape != positions.shape:
        raise ValueError(f"{len(seeds)} seeds for {len(positions)} positions: pass one of each a request")
    out = np.empty(len(seeds))
    fill(seeds, int(purpose), positions, np.broadcast_to(np.asarray(rounds, dtype=np.int64), seeds.shape), out)
    return out


def block_uniforms(
    seeds: Sequence[int] | np.ndarray,
    starts: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    rounds: Sequence[int] | np.ndarray,
) -> BlockUniforms:
    """The noise of one verification step.

    Args:
        seeds: [B]. starts: [B] output position of each request's first drafted token.
        lengths: [B] draft lengths K_b, 0 allowed. rounds: [B] verification steps the request has had.
    """
    from spec.random_numba import fill_block

    seeds, starts, lengths, rounds = (
        as_seeds(seeds),
        *(np.asarray(x, dtype=np.int64) for x in (starts, lengths, rounds)),
    )
    if not len(seeds) == len(starts) == len(lengths) == len(rounds):
        raise ValueError("seeds, starts, lengths and rounds must have one entry a request each")
    drafted = int(lengths.sum())
    accept, last = np.empty(drafted), np.empty(drafted + len(seeds))
    fill_block(seeds, starts, lengths, rounds, accept, last)
    return BlockUniforms(accept, last)
