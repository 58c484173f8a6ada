"""What verification steps cost on this machine, learnt while running: running medians, robust to hiccups."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

import numpy as np

_WINDOW = 15  # last measurements a median is of
_STALE = 512  # steps after which a number of rows that has not come up again is forgotten
_GUESS = 0.1  # draft token / target step, before a draft was timed


class StepCosts:
    """Seconds of a target step by its number of rows, and of drafting one token.

    Between numbers of rows that have been timed the cost is interpolated; beyond them it is taken as that of the
    nearest, which is what a step bound by reading the weights costs. If that is too hopeful, trying it corrects it.
    A prompt's row counts as one, though it has no output row: where requests come and go there is a prompt in most
    steps, and without these nothing would be learnt of a full batch.
    """

    def __init__(self) -> None:
        self._target: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}  # number of rows -> step it last came up
        self._draft: deque[float] = deque(maxlen=_WINDOW)
        self._step = 0

    def observe(self, rows: int, seconds_target: float, longest_draft: int, seconds_draft: float) -> None:
        """A step with so many target rows and, of its drafts, so many tokens in the longest."""
        self._step += 1
        place = rounded(rows)
        self._target.setdefault(place, deque(maxlen=_WINDOW)).append(seconds_target)
        self._seen[place] = self._step
        if longest_draft:
            self._draft.append(seconds_draft / longest_draft)
        if self._step % _STALE == 0:
            for old in [place for place, step in self._seen.items() if step <= self._step - _STALE]:
                del self._target[old], self._seen[old]

    def target(self, rows: np.ndarray) -> np.ndarray:
        """Seconds of a target step with [n] numbers of rows; 1 before any was timed."""
        if not self._target:
            return np.ones(len(rows))
        places = sorted(self._target)
        return np.interp(rows, places, [median(self._target[place]) for place in places])

    def draft_token(self) -> float:
        """Seconds a token of the longest draft; a tenth of the shortest target step before a draft was timed."""
        if self._draft:
            return median(self._draft)
        return _GUESS * min((median(times) for times in self._target.values()), default=1.0)


def rounded(rows: int) -> int:
    """Numbers of rows that share their measurements: each up to 16 its own, then steps of about 19 %."""
    return rows if rows <= 16 else round(2 ** (round(4 * math.log2(rows)) / 4))
