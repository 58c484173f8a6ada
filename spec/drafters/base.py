"""What the engine asks of a drafter.

Shape legend: B sequences, K_b drafted tokens of sequence b, V the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from spec.params import Params
from spec.verify import Drafts

if TYPE_CHECKING:
    from spec.constraint import Constraint


@dataclass(eq=False)
class Context:
    """A running sequence as a drafter sees it. The engine owns and changes it; drafters only read."""

    id: int  # of the sequence, unique in the life of an engine
    params: Params
    prompt_ids: tuple[int, ...]  # samples of one request hold the same object
    output_ids: list[int] = field(default_factory=list)  # committed so far
    round: int = 0  # verification steps so far: part of the key of DRAFT draws
    capacity: int = 0  # the longest the whole sequence can become
    constraint: Constraint | None = None  # what the output must match

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens ``start`` to ``stop`` of prompt and output; copies no more than these."""
        prompt = len(self.prompt_ids)
        if start >= prompt:
            return self.output_ids[start - prompt : stop - prompt]
        return [*self.prompt_ids[start:stop], *self.output_ids[: max(stop - prompt, 0)]]


class Drafter(Protocol):
    """Proposes tokens for the target to verify. Not thread-safe: one engine drives it.

    Exactness is shared work: whether (and how far) token i is drafted may depend on the committed text and on the
    drafted tokens before i, never on the outcome of drawing token i; the probabilities in ``Drafts`` are those the
    tokens were drawn from, processed by :mod:`spec.sampling` with the sequence's own parameters.
    """

    name: str

    def open(self, context: Context) -> bool:
        """A sequence starts. False while there is no room for it: the engine lets it wait for others to end.

        (If nothing else runs it is decoded plainly: the same text whatever else is in the batch.)
        """

    def propose(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Drafts:
        """At most ``lengths[b]`` tokens for each sequence (it may propose fewer, or none), in the order given.

        The engine passes sequences with a length of at least 1 only; one that is left out for some steps has grown by
        any number of tokens when it comes back.
        """

    def commit(self, context: Context, accepted: int) -> None:
        """The last proposal was verified: its first ``accepted`` tokens and one more token are in ``output_ids``.

        Not called for a sequence that ended there: ``close`` is.
        """

    def close(self, context: Context) -> None:
        """The sequence ended."""
