"""Where sequences lie in the memory of a KV cache.

One pool of positions; a sequence has a run of consecutive ones, as long as it may ever become, so attention reads keys
and values in place. Rolling back is free: the next step writes over what was rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """Consecutive positions of the pool, a multiple of its block long."""

    start: int
    length: int


@dataclass
class Pool:
    """Hands out spans of ``positions`` positions, whole blocks each, first fit."""

    positions: int
    block: int = 16
    _free: list[Span] = field(init=False)  # by start, never adjacent

    def __post_init__(self) -> None:
        self._free = [Span(0, self.positions // self.block * self.block)]

    @property
    def largest(self) -> int:
        """The longest span an empty pool can give."""
        return self.positions // self.block * self.block

    @property
    def free(self) -> int:
        """Positions nobody has."""
        return sum(span.length for span in self._free)

    def allocate(self, length: int) -> Span | None:
        """A span of at least ``length`` positions, or None while there is none.

        Raises ValueError for a length this pool can never give.
        """
        needed = -(-max(length, 1) // self.block) * self.block
        if needed > self.largest:
            raise ValueError(f"{length} tokens do not fit the cache of {self.largest}: make the cache larger")
        for i, span in enumerate(self._free):
            if span.length >= needed:
                rest = Span(span.start + needed, span.length - needed)
                self._free[i : i + 1] = [rest] if rest.length else []
                return Span(span.start, needed)
        return None

    def release(self, span: Span) -> None:
        """Takes a span back and joins it with its free neighbours."""
        at = next((i for i, other in enumerate(self._free) if other.start > span.start), len(self._free))
        before = self._free[at - 1] if at else None
        after = self._free[at] if at < len(self._free) else None
        start, end = span.start, span.start + span.length
        first, last = at, at
        if before is not None:
            assert before.start + before.length <= start, "released twice"
            if before.start + before.length == start:
                start, first = before.start, at - 1
        if after is not None:
            assert end <= after.start, "released twice"
            if end == after.start:
                end, last = after.start + after.length, at + 1
        self._free[first:last] = [Span(start, end - start)]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike: what one may take over of the other's keys and values.

    By bisection on slices, which are compared in C: prompts are long, and many run at once.
    """
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def best_source(prompt: Sequence[int], others: Iterable[tuple[int, Sequence[int], int]]) -> tuple[int, int]:
    """Whose keys and values to take over: (slot, tokens), tokens 0 where there is nothing.

    Args:
        prompt: whose last token is never taken over: it is fed for the logits it gives.
        others: slot, prompt and number of cached tokens of each.
    """
    most = len(prompt) - 1
    found = ((slot, min(common_prefix(other, prompt), most, cached)) for slot, other, cached in others)
    return max(found, key=lambda pair: pair[1], default=(-1, 0))
