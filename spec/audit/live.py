"""Live traffic as an audit may see it: which requests are watched, and in which order their answers are fed.

The evidence and the bound hold for tokens drawn one after the other from the target's law, whatever was drawn before.
Traffic has that property only if nothing that happened to an answer decides whether and when it is fed:

- a request is *chosen when it arrives*, by a random number that nobody else sees;
- answers are fed in the *order of arrival*. In the order of finishing, early looks would see the short answers, whose
  end-of-text token came early: more of it than the target says, and a false alarm;
- answers cut short (cancelled, an error, a stop string) are fed *as far as they came*: when to stop was decided by the
  tokens up to there. Every token drawn is included, also those of the stop string and those a client never read;
- a *seed that a client gives twice* makes two answers of one noise, which are not independent: the second is skipped,
  and so are all of a client's seeds beyond the number that can be remembered;
- *greedy* requests have no noise to test.

A slow answer holds back those that arrived after it. So that this stays bounded no more are chosen while ``waiting`` of
them are open: that depends on earlier answers alone, and is allowed.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from spec.audit.sample import Sample
from spec.params import Params

_SEEDS = 2**16  # of clients, remembered


@dataclass
class Ticket:
    """A chosen request; hand it to :meth:`Arrivals.finished` with its answer."""

    answer: Sample | None = None
    done: bool = False


@dataclass
class Arrivals:
    """Not safe for threads: call it from one, or hold a lock.

    ``share`` of the requests in [0, 1]; ``waiting``: chosen ones not fed yet, at most.
    """

    share: float
    waiting: int = 64
    random: random.Random = field(default_factory=random.SystemRandom)
    _open: deque[Ticket] = field(default_factory=deque)
    _seeds: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share}: the share of requests to audit must be between 0 and 1")

    def arrived(self, params: Params, *, clients_seed: bool) -> Ticket | None:
        """Call it before the request's first token, in the order of arrival. None: this request is not watched.

        ``clients_seed``: the seed in ``params`` was given by the client, not drawn for this request alone.
        """
        drawn = self.random.random() < self.share
        used = clients_seed and (params.seed in self._seeds or len(self._seeds) >= _SEEDS)
        if params.greedy or used or not drawn or len(self._open) >= self.waiting:
            return None
        if clients_seed:
            self._seeds.add(params.seed)
        self._open.append(Ticket())
        return self._open[-1]

    def finished(self, ticket: Ticket, answer: Sample | None) -> list[Sample]:
        """The answers that may be fed now, in order. ``answer`` None: no token was drawn. ValueError for a used ticket.

        Call it for every ticket, however its request ended: one that never comes back holds up all after it.
        """
        if ticket.done:
            raise ValueError("this request has finished before: hand in each ticket once")
        ticket.answer, ticket.done = answer, True
        ready = []
        while self._open and self._open[0].done:
            first = self._open.popleft().answer
            if first is not None:
                ready.append(first)
        return ready
