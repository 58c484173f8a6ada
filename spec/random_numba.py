"""Loops over :func:`spec.random.uniform`, compiled by numba. Imported only where they run.

numba's cache knows this file's date, not spec/random.py's: after a change there, touch this file too.
"""

from __future__ import annotations

import numba

from spec import random

_jit = numba.njit(cache=True, nogil=True)
_ACCEPT, _RESIDUAL, _BONUS, _TARGET = (int(random.Purpose[name]) for name in ("ACCEPT", "RESIDUAL", "BONUS", "TARGET"))
philox = _jit(random.philox)


@_jit
def _uniform(seed, purpose, position, step):  # type: ignore[no-untyped-def]
    mask = 0xFFFFFFFF
    high, low, _, _ = philox(position & mask, step & mask, purpose, 0, seed & mask, (seed >> 32) & mask)
    return ((high << 21) | (low >> 11)) * 2.0**-53


@_jit
def fill(seeds, purpose, positions, rounds, out):  # type: ignore[no-untyped-def]
    for b in range(len(seeds)):
        out[b] = _uniform(seeds[b], purpose, positions[b], rounds[b])


@_jit
def fill_block(seeds, starts, lengths, rounds, accept, last):  # type: ignore[no-untyped-def]
    """accept [M], last [N]: see :class:`spec.random.BlockUniforms`."""
    at = 0
    for b in range(len(seeds)):
        for i in range(lengths[b]):
            accept[at + i] = _uniform(seeds[b], _ACCEPT, starts[b] + i, rounds[b])
            last[at + b + i] = _uniform(seeds[b], _RESIDUAL, starts[b] + i, 0)
        purpose = _BONUS if lengths[b] > 0 else _TARGET
        at += lengths[b]
        last[at + b] = _uniform(seeds[b], purpose, starts[b] + lengths[b], 0)
