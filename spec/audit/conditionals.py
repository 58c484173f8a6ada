"""Where next-token logits of a given text come from: the teacher-forced target, or a draft.

Shape legend: n rows (tokens of completions, one after the other), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from spec.audit.sample import Sample
from spec.models.base import Step

if TYPE_CHECKING:
    from spec.models.base import LanguageModel


class Conditionals(Protocol):
    """Logits before every token of every sample."""

    vocab_size: int

    def rows(self, samples: Sequence[Sample], most: int) -> Iterator[Tensor]:
        """Pieces [n, V], n <= ``most``: together one row a token, in order. A piece is valid until the next."""


class ModelConditionals:
    """By a language model, a sequence at a time and ``most`` tokens a forward pass, so that memory stays bounded."""

    def __init__(self, model: LanguageModel):
        self.model, self.vocab_size = model, model.vocab_size

    def rows(self, samples: Sequence[Sample], most: int) -> Iterator[Tensor]:
        for sample in samples:
            yield from self._one(sample, most)

    def _one(self, sample: Sample, most: int) -> Iterator[Tensor]:
        text = [*sample.prompt_ids, *sample.token_ids][:-1]  # the row before each token
        slot = self.model.open(len(text))
        if slot is None:
            raise ValueError(f"{self.model.name} has no room for {len(text)} tokens: give it a larger cache")
        try:
            for start in range(0, len(text), most):
                part = text[start : start + most]
                wanted = np.arange(max(len(sample.prompt_ids) - 1 - start, 0), len(part), dtype=np.int64)
                logits = self.model.forward(
                    Step(
                        token_ids=torch.tensor(part, device=self.model.device),
                        slots=np.array([slot]),
                        starts=np.array([start]),
                        lengths=np.array([len(part)]),
                        logit_rows=wanted,
                    )
                )
                if len(wanted):
                    yield logits
        finally:
            self.model.close(slot)


class LookupConditionals:
    """The one-hot law of a text's own repetition: the token after the last place where its last two tokens occurred.

    Not any engine's lookup exactly, but near all of them: where an engine leaks what it looked up, it leaks this.
    Uniform where nothing occurred before.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def rows(self, samples: Sequence[Sample], most: int) -> Iterator[Tensor]:
        for sample in samples:
            found = self._continuations(sample)
            for start in range(0, len(found), most):
                part = found[start : start + most]
                logits = torch.zeros(len(part), self.vocab_size)
                for row, token in enumerate(part):
                    if token is not None:
                        logits[row] = -torch.inf
                        logits[row, token] = 0.0
                yield logits

    @staticmethod
    def _continuations(sample: Sample) -> list[int | None]:
        text, first = [*sample.prompt_ids, *sample.token_ids], len(sample.prompt_ids)
        followed: dict[tuple[int, int], int] = {}
        found: list[int | None] = []
        for at, token in enumerate(text):
            key = (text[at - 2], text[at - 1]) if at >= 2 else None
            if at >= first:
                found.append(None if key is None else followed.get(key))
            if key is not None:
                followed[key] = token
        return found


def regrouped(pieces: Iterator[Tensor], sizes: Iterator[int]) -> Iterator[Tensor]:
    """The same rows in pieces of the given sizes; copies only what it must join."""
    held: list[Tensor] = []
    have = 0
    for size in sizes:
        while have < size:
            piece = next(pieces)
            held.append(piece.clone())
            have += len(piece)
        joined = held[0] if len(held) == 1 else torch.cat(held)
        yield joined[:size]
        held, have = [joined[size:]], have - size
