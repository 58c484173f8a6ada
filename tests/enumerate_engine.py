"""The exact law of what an engine does: every random decision it takes is followed down every branch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from spec.verify import Drafts, Mode, Verdicts, laws, length_law

Text = tuple[int, ...]


class Branches:
    """Runs a program once for every sequence of choices it can make, by replaying some of them and trying the next.

    In place of draws: a drafted token is a choice by the draft's probabilities, and a verification step two choices,
    how many tokens are accepted and the last one, by :func:`spec.verify.laws`.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        patch.setattr("spec.drafters.model.sample", self._sample)
        patch.setattr("spec.rows.verify", self._verify)
        self._replay: list[int] = []
        self._path: list[tuple[int, np.ndarray]] = []

    def law(self, program: Callable[[], Text]) -> dict[Text, float]:
        """Probability of each result."""
        total: dict[Text, float] = defaultdict(float)
        for weight, result in self._runs(program):
            total[result] += weight
        return dict(total)

    def _runs(self, program: Callable[[], Text]) -> Iterator[tuple[float, Text]]:
        self._replay = []
        while True:
            self._path = []
            result = program()
            yield float(np.prod([law[choice] for choice, law in self._path])), result
            while self._path:
                choice, law = self._path.pop()
                later = np.flatnonzero(law[choice + 1 :])
                if len(later):
                    self._replay = [*(chosen for chosen, _ in self._path), choice + 1 + int(later[0])]
                    break
            else:
                return

    def _choose(self, law: torch.Tensor) -> int:
        at, weights = len(self._path), law.double().numpy()
        choice = self._replay[at] if at < len(self._replay) else int(np.flatnonzero(weights)[0])
        self._path.append((choice, weights))
        return choice

    def _sample(self, probs: torch.Tensor, noise: Sequence[float]) -> torch.Tensor:
        return torch.tensor([self._choose(row) for row in probs])

    def _verify(self, target: torch.Tensor, drafts: Drafts, accept: object, last: object, *, mode: Mode) -> Verdicts:
        accept_probs, last_laws = laws(target, drafts, mode=mode)
        accepted, tokens, at = [], [], 0
        for b, size in enumerate(drafts.lengths):
            accepted.append(self._choose(length_law(accept_probs[at : at + size], mode)))
            tokens.append(self._choose(last_laws[at + b + accepted[-1]]))
            at += size
        return Verdicts(torch.tensor(accepted), torch.tensor(tokens), accept_probs)


def text_law(next_token: Callable[[Text], np.ndarray], longest: int, stops: frozenset[int]) -> dict[Text, float]:
    """Law of the text when tokens are drawn one by one, until a stop token or ``longest``."""
    done: dict[Text, float] = {}
    running: dict[Text, float] = {(): 1.0}
    while running:
        text, weight = running.popitem()
        for token, p in enumerate(next_token(text)):
            grown = (*text, token)
            (done if token in stops or len(grown) == longest else running)[grown] = weight * float(p)
    return done
