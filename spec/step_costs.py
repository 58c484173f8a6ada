"""What verification steps cost on this machine, learnt while running: running medians, robust to hiccups."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

import numpy as np

_WINDOW = 15  # last measurements a median is of
_DRAFTS = 5  # of drafts: where drafting seems not to pay there is one now and then, and it must be able to show it does
_STALE = 512  # steps after which a number of rows that has not come up again is forgotten
_GUESS = 0.1  # draft token / target step, before a draft was timed
_ENOUGH = 3  # measurements of a number of rows from which one hiccup no longer decides
_TELLING = 8  # tokens read by a draft from which their cost shows beside that of drafting


class StepCosts:
    """Seconds of a target step by its number of rows, of drafting one token, and of what a draft reads before.

    Between numbers of rows that have been timed the cost is interpolated; beyond them every row is taken to add what a
    prompt's row does, or nothing before one was timed. If that is too hopeful, trying it corrects it.
    Where requests come and go there is a prompt in most steps, and without these nothing would be learnt of a full
    batch. A prompt's rows are cheaper than output rows (nothing is drawn from them), so they have a cost of their own,
    which is taken off.

    Drafting a token for many sequences is dearer than for one, as a target step is: what was timed for fewer sequences
    is scaled by what the target's step takes for the two numbers. What was timed for more is scaled by the numbers
    themselves, which is hopeful: a draft that is wrongly taken for dear would never be timed.
    """

    def __init__(self) -> None:
        self._target: dict[int, deque[float]] = {}
        self._prompt: deque[float] = deque(maxlen=_WINDOW)  # a row
        self._seen: dict[int, int] = {}  # number of rows -> step it last came up
        self._draft: dict[int, deque[float]] = {}  # by number of sequences
        self._reading: deque[float] = deque(maxlen=_DRAFTS)  # a token
        self._step = 0

    def observe(self, rows: int, seconds: float, prompt_rows: int = 0) -> None:
        """A target step with so many output rows, which also read so many tokens of prompts."""
        self._step += 1
        place, of_prompts = rounded(rows), 0.0
        if prompt_rows:
            if place in self._target:
                self._prompt.append(max(seconds - median(self._target[place]), 0.0) / prompt_rows)
            each = median(self._prompt) if self._prompt else seconds / (rows + prompt_rows)
            of_prompts = prompt_rows * each
        if prompt_rows <= 2 * rows:  # or an error in what is taken off would be larger than what is left
            self._target.setdefault(place, deque(maxlen=_WINDOW)).append(max(seconds - of_prompts, 0.0))
            self._seen[place] = self._step
        if self._step % _STALE == 0:
            for old in [place for place, step in self._seen.items() if step <= self._step - _STALE]:
                del self._target[old], self._seen[old]

    def knows(self, rows: int) -> bool:
        """Whether steps with so many rows were timed often enough to be compared with."""
        return len(self._target.get(rounded(rows), ())) >= _ENOUGH

    def target(self, rows: np.ndarray) -> np.ndarray:
        """Seconds of a target step with [n] numbers of rows; 1 before any was timed."""
        if not self._target:
            return np.ones(len(rows))
        places = sorted(self._target)
        steps = _not_falling([median(self._target[place]) for place in places], [len(self._target[p]) for p in places])
        known = np.interp(rows, places, steps)
        beyond = np.maximum(np.asarray(rows) - places[-1], 0)
        return known + beyond * (median(self._prompt) if self._prompt else 0.0)

    def observe_draft(self, sequences: int, longest: int, unread: int, seconds: float) -> None:
        """A proposal for so many sequences, up to ``longest`` tokens each; ``unread`` tokens were read before."""
        if not unread:
            self._draft.setdefault(rounded(sequences), deque(maxlen=_DRAFTS)).append(seconds / longest)
        elif unread >= _TELLING:
            self._reading.append(max(seconds - longest * self.draft_token(sequences), 0.0) / unread)

    def draft_token(self, sequences: int) -> float:
        """Seconds a token of the longest draft; a tenth of a target step before any was timed."""
        here = float(self.target(np.array([sequences]))[0])
        if not self._draft:
            return _GUESS * here
        near = min(self._draft, key=lambda place: abs(math.log(place / sequences)))
        scale = sequences / near if sequences < near else here / float(self.target(np.array([near]))[0])
        return median(self._draft[near]) * scale

    def reading(self) -> float:
        """Seconds a token that a draft must read before it can go on; nothing before any was timed.

        No more than a drafted one's: the first readings may have compiled something.
        """
        return min(median(self._reading), self.draft_token(1)) if self._reading else 0.0


def _not_falling(values: list[float], weights: list[int]) -> list[float]:
    """The nearest values that never fall, by weighted least squares: where more rows seem to take less, all their mean.

    Pool adjacent violators (Ayer et al. 1955).
    """
    pools: list[tuple[float, int, int]] = []  # mean, weight, number of values
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, heavy, size = pools.pop()
            total = heavy + pool[1]
            pool = ((mean * heavy + pool[0] * pool[1]) / total, total, size + pool[2])
        pools.append(pool)
    return [mean for mean, _, size in pools for _ in range(size)]


def rounded(rows: int) -> int:
    """Numbers of rows that share their measurements: each up to 16 its own, then steps of about 19 %."""
    return rows if rows <= 16 else round(2 ** (round(4 * math.log2(rows)) / 4))
