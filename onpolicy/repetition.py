"""Repetition in one completion: loops and repeated n-grams. [L] int64 token ids everywhere."""

from __future__ import annotations

import numba
import numpy as np

_jit = numba.njit(cache=True, nogil=True)


@_jit
def _longest_loop(ids: np.ndarray, loop_length: int) -> int:
    longest = 0
    for period in range(1, min(loop_length, len(ids) // 2) + 1):
        run = 0  # tokens equal to the one a period before
        for t in range(period, len(ids)):
            run = run + 1 if ids[t] == ids[t - period] else 0
            if run >= period and run + period > longest:
                longest = run + period
    return longest


@_jit
def _loop_end(ids: np.ndarray, loop_length: int, repeats: int) -> int:
    end = len(ids)
    for period in range(1, min(loop_length, len(ids) // repeats) + 1):
        run = 0
        for t in range(period, end):
            run = run + 1 if ids[t] == ids[t - period] else 0
            if run >= (repeats - 1) * period:
                end = t + 1
                break
    return end


def longest_loop(ids: np.ndarray, loop_length: int) -> int:
    """Tokens of the longest stretch in which a unit of at most ``loop_length`` tokens comes at least twice in a row.

    0 where there is none. A last, incomplete repeat counts: [1, 2, 3, 1, 2, 3, 1] is a loop of 7 tokens.
    """
    return int(_longest_loop(np.asarray(ids, np.int64), loop_length))


def loop_end(ids: np.ndarray, loop_length: int, repeats: int) -> int:
    """How many tokens to keep: up to where some unit of at most ``loop_length`` has come ``repeats`` times in a row.

    len(ids) where that never happens. Whether a token is kept depends on the tokens before it alone.
    """
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2 (once is no loop), got {repeats}")
    return int(_loop_end(np.asarray(ids, np.int64), loop_length, repeats))


def count_ngrams(ids: np.ndarray, n: int) -> tuple[int, int]:
    """(n-grams that occurred earlier in the same completion, all its n-grams)."""
    total = len(ids) - n + 1
    if total < 1:
        return 0, 0
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(ids, np.int64), n)
    return total - len(np.unique(windows, axis=0)), total
