"""Prompt lookup: what followed the last time the text ended like this (Saxena 2023, "prompt lookup decoding").

The longest suffix of prompt and output of ``min_n`` to ``max_n`` tokens that occurred before is looked up, and what
followed its most recent occurrence is proposed. Every n-gram's latest place is kept in a hash table, so a proposal
costs O(max_n) operations for every token committed since the last, not a scan of the text.
"""

from __future__ import annotations

import numba
import numpy as np

from spec.drafters.base import Context
from spec.drafters.lookup import LookupDrafter, grown

_jit = numba.njit(cache=True, nogil=True)
_LONGEST = 64  # n-grams longer than this add cost and no evidence


class NgramDrafter(LookupDrafter["NgramIndex"]):
    """Proposes from the text itself, without a model. Most useful where output repeats its prompt."""

    name = "ngram"

    def __init__(self, max_n: int = 4, min_n: int = 2) -> None:
        """Raises ValueError unless 1 <= min_n <= max_n <= 64."""
        super().__init__()
        if not 1 <= min_n <= max_n <= _LONGEST:
            raise ValueError(f"min_n={min_n}, max_n={max_n}: need 1 <= min_n <= max_n <= {_LONGEST}; 2 and 4 are usual")
        self.min_n, self.max_n = min_n, max_n

    def new_index(self, context: Context) -> NgramIndex:
        return NgramIndex(self.max_n, self.min_n, max(context.capacity, len(context)))

    def continuation(self, context: Context, index: NgramIndex, limit: int) -> np.ndarray:
        return index.continuation(limit)


class NgramIndex:
    """The latest place of every n-gram of a growing text. One that outgrows ``capacity`` is indexed again."""

    def __init__(self, max_n: int, min_n: int, capacity: int) -> None:
        self._max_n, self._min_n = max_n, min_n
        self._tokens = np.empty(max(capacity, 16), dtype=np.int64)
        self._length = 0
        self._indexed = 0  # n-grams that end before this place are in the table
        self._clear()

    def __len__(self) -> int:
        return self._length

    def extend(self, tokens: np.ndarray) -> None:
        length = self._length + len(tokens)
        if length > len(self._tokens):
            self._tokens = grown(self._tokens, length)
            self._clear()
        self._tokens[self._length : length] = tokens
        self._length = length

    def continuation(self, limit: int) -> np.ndarray:
        """What followed the latest earlier occurrence, [limit] tokens or none at all.

        Where the occurrence is d tokens back and d < limit, the continuation runs into the proposal itself: the last d
        tokens are repeated.
        """
        end = _latest(self._tokens, self._length, self._indexed, self._table, self._min_n, self._max_n)
        self._indexed = max(self._length - 1, 0)
        if end < 0:
            return self._tokens[:0]
        period = self._length - 1 - end
        if period >= limit:
            return self._tokens[end + 1 : end + 1 + limit].copy()
        return np.resize(self._tokens[end + 1 : self._length], limit)

    def _clear(self) -> None:
        slots = 1 << (2 * len(self._tokens) - 1).bit_length()  # a power of two, never more than half full
        self._table = np.full((self._max_n - self._min_n + 1, slots), -1, dtype=np.int32)
        self._indexed = 0


@_jit
def _latest(tokens, length, indexed, table, min_n, max_n):  # type: ignore[no-untyped-def]
    """Where the longest suffix n-gram of tokens[:length] last ended before the text's end, or -1.

    table [max_n - min_n + 1, slots] maps n-grams to the place of their last token; the n-grams that end at
    ``indexed`` .. length - 2 are entered first. The last token has no successor yet, so it is entered next time.
    """
    for end in range(indexed, length - 1):
        hashed = 0
        for n in range(1, min(max_n, end + 1) + 1):
            hashed = _mixed(hashed, tokens[end - n + 1])
            if n >= min_n:
                row = table[n - min_n]
                row[_slot(tokens, row, hashed, end, n)] = end
    found, hashed, last = -1, 0, length - 1
    for n in range(1, min(max_n, length) + 1):
        hashed = _mixed(hashed, tokens[last - n + 1])
        if n >= min_n:
            row = table[n - min_n]
            place = row[_slot(tokens, row, hashed, last, n)]
            if place < 0:  # then no longer one occurred either
                break
            found = place
    return found


@_jit
def _mixed(hashed, token):  # type: ignore[no-untyped-def]
    """Of an n-gram's hash and the token before it: the hash of the (n+1)-gram. int64 arithmetic wraps."""
    mixed = (hashed ^ token) * 0x2545F4914F6CDD1D + 0x9E3779B9
    return mixed ^ (mixed >> 29)


@_jit
def _slot(tokens, row, hashed, end, n):  # type: ignore[no-untyped-def]
    """The slot that holds the n-gram ending at ``end``, or the free one where it belongs (linear probing)."""
    mask = len(row) - 1
    slot = hashed & mask
    while row[slot] >= 0 and not _equal(tokens, row[slot], end, n):
        slot = (slot + 1) & mask
    return slot


@_jit
def _equal(tokens, first, second, n):  # type: ignore[no-untyped-def]
    same = 0
    while same < n and tokens[first - same] == tokens[second - same]:
        same += 1
    return same == n
