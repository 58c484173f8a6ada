"""Suffix lookup: the most frequent continuation of the longest suffix that occurred before.

Like prompt lookup without a bound on the match, and with counts: how much is drafted grows with the length of the match
and ends where the text has gone on in too many ways (SuffixDecoding, Oliaro et al. 2411.04975; one path here, not a
tree). The text's suffix automaton takes O(1) amortised a token.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from spec.drafters.base import Context
from spec.drafters.lookup import LookupDrafter, tokens_from
from spec.drafters.suffix_automaton import SEPARATOR, SuffixAutomaton

_NO_TEXT = np.zeros(0, dtype=np.int64)


class SuffixDrafter(LookupDrafter[SuffixAutomaton]):
    """Proposes from the sequence's own text and, if ``shared``, from earlier outputs of the same engine.

    With ``shared`` a proposal depends on which other requests ended before. The text stays exact in law, because a
    proposal is still fixed before the step's noise is looked at; but a request sampled with a given seed then comes out
    differently in other company. Therefore it is off by default.
    """

    name = "suffix"

    def __init__(
        self,
        min_match: int = 2,
        factor: float = 2.0,
        min_share: float = 0.1,
        shared: bool = False,
        shared_tokens: int = 200_000,
    ) -> None:
        """
        Args:
            min_match: shortest suffix, in tokens, worth continuing.
            factor: a match of m tokens is continued by at most floor(factor m) tokens, at least 1.
            min_share: a proposal ends before its estimated probability, from counts, falls below this.
            shared: also look in outputs of sequences that have ended.
            shared_tokens: how much of them is kept; the oldest half is dropped when it is exceeded.

        Raises ValueError for a value outside its range.
        """
        super().__init__()
        if min_match < 1:
            raise ValueError(f"min_match={min_match}: must be at least 1; 2 is usual")
        if not factor > 0:
            raise ValueError(f"factor={factor}: must be positive; between 1 and 4 is usual")
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share={min_share}: must be in [0, 1]; use 0 to switch it off")
        if shared_tokens < 1:
            raise ValueError(f"shared_tokens={shared_tokens}: must be positive; shared=False keeps nothing")
        self.min_match, self.factor, self.min_share = min_match, factor, min_share
        self._corpus = Corpus(shared_tokens) if shared else None

    def new_index(self, context: Context) -> SuffixAutomaton:
        return SuffixAutomaton(2 * len(context))

    def continuation(self, context: Context, index: SuffixAutomaton, limit: int) -> np.ndarray:
        own, expected = self._continued(index, limit)
        if self._corpus is None:
            return own
        tail = tokens_from(context, max(len(context) - _LONGEST_SHARED, 0))
        shared, hoped = self._continued(self._corpus.automaton, limit, tail)
        return shared if hoped > expected else own

    def close(self, context: Context) -> None:
        super().close(context)
        if self._corpus is not None:
            self._corpus.add(np.array(context.output_ids, dtype=np.int64))

    def _continued(
        self, automaton: SuffixAutomaton, limit: int, tail: np.ndarray | None = None
    ) -> tuple[np.ndarray, float]:
        """What follows the automaton's own text, or ``tail`` where given, and how many tokens of it to expect."""
        match = automaton.repeated_suffix() if tail is None else automaton.match(tail)
        if match.length < self.min_match:
            return _NO_TEXT, 0.0
        limit = min(limit, max(int(self.factor * match.length), 1))
        return automaton.continuation(match, limit, self.min_share)


_LONGEST_SHARED = 32  # tokens of a sequence that are looked up among earlier outputs


class Corpus:
    """Texts that ended, newest last, in one automaton. When they exceed ``limit`` tokens the oldest half goes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._texts: deque[np.ndarray] = deque()
        self.automaton = SuffixAutomaton()

    def add(self, text: np.ndarray) -> None:
        """[T] int64; of a text longer than the limit, its end."""
        text = text[-self._limit :]
        self._texts.append(text)
        self.automaton.extend(np.append(text, SEPARATOR))
        if len(self.automaton) > self._limit + len(self._texts):
            self._shrink()

    def _shrink(self) -> None:
        """Rebuilds from the newest texts that fit in half the limit: amortised O(1) a token. The newest one stays."""
        while len(self._texts) > 1 and sum(map(len, self._texts)) > self._limit // 2:
            self._texts.popleft()
        self.automaton = SuffixAutomaton()
        for text in self._texts:
            self.automaton.extend(np.append(text, SEPARATOR))
