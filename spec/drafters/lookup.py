"""What drafters without a model share: one index a sequence, brought up to date when it is next asked to draft.

An index holds committed tokens only, which are never taken back, so rejected drafts and rounds in which another drafter
(or none) served the sequence need no bookkeeping: the context has simply grown. Proposals are a function of the
committed text and therefore deterministic: q is one-hot (``Drafts.probs`` is None), however long they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from spec.drafters.base import Context
from spec.verify import Drafts


class TextIndex(Protocol):
    """What a lookup keeps of one text."""

    def __len__(self) -> int:
        """Tokens taken in so far."""

    def extend(self, tokens: np.ndarray) -> None:
        """[T] int64 tokens that follow those taken in so far."""


AnIndex = TypeVar("AnIndex", bound=TextIndex)


class LookupDrafter(Generic[AnIndex]):
    """The :class:`spec.drafters.base.Drafter` around an index; subclasses say what it is and what it proposes."""

    name = "lookup"

    def __init__(self) -> None:
        self._indices: dict[int, AnIndex] = {}

    def new_index(self, context: Context) -> AnIndex:
        """An empty index for a sequence."""
        raise NotImplementedError

    def continuation(self, context: Context, index: AnIndex, limit: int) -> np.ndarray:
        """At most ``limit`` tokens, [K] int64, to follow the sequence, all of which the index holds. ``limit`` >= 1."""
        raise NotImplementedError

    def open(self, context: Context) -> bool:
        self._indices[context.id] = self.new_index(context)
        return True

    def propose(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Drafts:
        return deterministic([self._propose(c, limit) for c, limit in zip(contexts, lengths, strict=True)])

    def commit(self, context: Context, accepted: int) -> None:
        """Nothing: the next proposal reads what was committed from the context."""

    def close(self, context: Context) -> None:
        del self._indices[context.id]

    def _propose(self, context: Context, limit: int) -> np.ndarray:
        if limit == 0:
            return _NOTHING
        index = self._indices[context.id]
        index.extend(tokens_from(context, len(index)))
        return self.continuation(context, index, limit)


_NOTHING = np.zeros(0, dtype=np.int64)


def tokens_from(context: Context, start: int) -> np.ndarray:
    """Prompt and output from token ``start`` on, [T] int64."""
    return np.array(context.tokens(start, len(context)), dtype=np.int64)


def deterministic(proposals: Sequence[np.ndarray]) -> Drafts:
    """Drafts with one-hot q from [B] arrays of token ids, on the CPU."""
    ids = np.concatenate([_NOTHING, *proposals])
    return Drafts(torch.from_numpy(ids), [len(proposal) for proposal in proposals])


def grown(array: np.ndarray, rows: int) -> np.ndarray:
    """A copy with at least ``rows`` rows, and at least twice as many as before; what is new is not initialised."""
    larger = np.empty((max(rows, 2 * len(array)), *array.shape[1:]), dtype=array.dtype)
    larger[: len(array)] = array
    return larger
