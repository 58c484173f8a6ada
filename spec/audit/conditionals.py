"""Where next-token logits of a given text come from: the teacher-forced target, or a draft.

Shape legend: n rows (tokens of completions, one after the other), V vocabulary.
"""

from __future__ import annotations

from collections import deque
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
    """By a language model: answers of ``most`` tokens together a forward pass, so that memory stays bounded.

    A prompt is read once for all answers to it that come soon after each other: audits ask everything several times.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.vocab_size = model, model.vocab_size

    def rows(self, samples: Sequence[Sample], most: int) -> Iterator[Tensor]:
        waiting = deque(samples)
        prompts = _Prompts(self.model, most)
        try:
            while waiting:
                yield from self._batch(waiting, prompts, most)
        finally:
            prompts.close()

    def _batch(self, waiting: deque[Sample], prompts: _Prompts, most: int) -> Iterator[Tensor]:
        """Of the next samples, which it takes from ``waiting``: at least one, however long."""
        starts: list[int] = []
        answers: list[list[int]] = []
        slots: list[int] = []
        try:
            while waiting and (not slots or sum(len(answer) for answer in answers) + len(waiting[0].token_ids) <= most):
                slot = prompts.open(waiting[0])
                if slot is None:
                    if slots:
                        break  # there will be room when these are closed
                    needed = len(waiting[0].prompt_ids) + len(waiting[0].token_ids) - 1
                    raise ValueError(f"{self.model.name} has no room for {needed} tokens: give it a larger cache")
                sample = waiting.popleft()
                slots.append(slot)
                starts.append(len(sample.prompt_ids) - 1)
                answers.append([sample.prompt_ids[-1], *sample.token_ids[:-1]])  # the row before each token
            if len(slots) > 1:
                yield _forward(self.model, slots, starts, answers)
            else:
                for at in range(0, len(answers[0]), most):
                    yield _forward(self.model, slots, [starts[0] + at], [answers[0][at : at + most]])
        finally:
            for slot in slots:
                self.model.close(slot)


class _Prompts:
    """Open slots that begin with a prompt, but for its last token; the newest prompts are kept to be copied."""

    def __init__(self, model: LanguageModel, most: int):
        self._model, self._most = model, most
        self._kept: dict[tuple[int, ...], int] = {}  # slots by prompt, the oldest first

    def open(self, sample: Sample) -> int | None:
        """A slot for the sample, its prompt in it; None without room, also after everything kept was given up."""
        known = len(sample.prompt_ids) - 1
        while (slot := self._model.open(known + len(sample.token_ids))) is None:
            if not self._kept:
                return None
            self._forget()
        try:
            self._fill(slot, sample.prompt_ids, known)
        except BaseException:  # nobody else knows of it yet
            self._model.close(slot)
            raise
        return slot

    def _fill(self, slot: int, prompt: tuple[int, ...], known: int) -> None:
        """The first ``known`` tokens of a prompt, copied where there is room to keep it."""
        source = self._kept.get(prompt)
        if source is None and len(self._kept) == _PROMPTS:
            self._forget()
        if source is None and known and (source := self._model.open(known)) is not None:
            self._kept[prompt] = source  # at once, so that close() finds it
            self._read(source, prompt[:known])
        if source is not None:
            self._model.fork(source, slot, known)
        else:
            self._read(slot, prompt[:known])

    def _read(self, slot: int, tokens: Sequence[int]) -> None:
        for at in range(0, len(tokens), self._most):
            _forward(self._model, [slot], [at], [tokens[at : at + self._most]], logits=False)

    def _forget(self) -> None:
        self._model.close(self._kept.pop(next(iter(self._kept))))

    def close(self) -> None:
        while self._kept:
            self._forget()


_PROMPTS = 16  # kept


def _forward(
    model: LanguageModel, slots: Sequence[int], starts: Sequence[int], parts: Sequence[Sequence[int]],
    logits: bool = True,
) -> Tensor:  # fmt: skip
    """Logits [n, V] of all tokens of the parts."""
    ids = torch.tensor([token for part in parts for token in part], device=model.device)
    wanted = np.arange(len(ids) if logits else 0, dtype=np.int64)
    lengths = np.array([len(part) for part in parts])
    return model.forward(Step(ids, np.array(slots), np.array(starts), lengths, wanted))


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
        have -= size
        held = [joined[size:]] if have else []
