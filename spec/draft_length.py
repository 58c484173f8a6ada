"""How many tokens to draft next: a fixed number, or what past acceptance and measured costs make fastest.

Exactness. Given the text so far, a verification step commits tokens with the target's law whatever its draft length
K, as long as K is settled before the step's noise is looked at. A policy here sees committed text, past acceptance and
past timings, all settled before the step; and DRAFT and ACCEPT draws are keyed by the round, so the step's noise is
independent of them (block verification has looked at draws of positions that are now drafted anew; they are not used
again). So every step has the target's law given the past, and by induction the text has it too. Past acceptance tells
something about the text already committed, never about the text to come. tests/test_draft_length.py sums the joint law
over every path for policies that depend on past acceptance as perversely as they can.

Shape legend: B sequences of a step, K_b drafted tokens of sequence b, N = sum(K_b + 1) target rows, L longest draft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from spec.drafters.base import Context
from spec.step_costs import StepCosts

_WORTHWHILE = 1.05  # what a batch must gain to begin to draft: the medians behind it may be off by less
_ALIKE = 5.0  # observations of its own that weigh as much, for a sequence, as what all the others showed
_PROBING = 1 / 32  # of the time, at the most, is spent on what probes have to read
_PATIENCE = 8  # plain steps in a row taken to learn what they cost
_PAYBACK = 32  # rounds within which drafting must pay for what the draft has to read first


class DraftLength(Protocol):
    """Decides the draft lengths of every verification step. Not thread-safe: one engine drives it."""

    def lengths(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[int]:
        """[B] draft lengths of the next step, ``0 <= K_b <= limits[b]``; the drafter may still propose fewer."""

    def observe(
        self,
        contexts: Sequence[Context],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds_target: float | None,
        seconds_draft: float | None,
        prompt_rows: int = 0,
    ) -> None:
        """What became of that step, plain ones (all K_b = 0) included: [B] drafted and accepted tokens.

        ``seconds_target`` is the target's forward with verification, in which ``prompt_rows`` tokens of prompts may
        have been read too; ``seconds_draft`` the whole proposal; None where they are not the policy's doing. Such a
        step is still to be observed, or what a sequence learns would depend on who else is in the batch.
        """

    def forget(self, context: Context) -> None:
        """The sequence ended."""


class Fixed:
    """The same length always; 0 is plain decoding."""

    def __init__(self, length: int) -> None:
        """Raises ValueError for a negative length."""
        if length < 0:
            raise ValueError(f"draft length {length}: must be at least 0; use 0 for plain decoding")
        self.length = length

    def lengths(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[int]:
        return [min(self.length, limit) for limit in limits]

    def observe(
        self,
        contexts: Sequence[Context],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds_target: float | None,
        seconds_draft: float | None,
        prompt_rows: int = 0,
    ) -> None:
        """Nothing is learnt."""

    def forget(self, context: Context) -> None:
        """Nothing is kept."""


class Adaptive:
    """The lengths with the most expected tokens a second, for the whole batch at once.

    Acceptance is estimated for each position of a draft from discounted counts of the sequence's own past, starting
    from that of all sequences so far; costs are running medians (:class:`spec.step_costs.StepCosts`). Where drafting
    does not pay the length is 0. Every ``probe_every`` rounds a sequence drafts one token more than seems best, and
    again in the next round as long as all of it is accepted: so it recovers. The costs of plain steps are refreshed by
    one plain step in ``probe_every``, and a number of sequences that is new begins with a few: whatever is chosen, both
    sides of the comparison were timed.

    A draft must first read what was said since it last drafted, the prompt to begin with. A sequence is drafted for
    only if that pays within the rounds it may have left.

    Measured costs, and acceptance shared among sequences, make the text of a sampled request exact in law but *not*
    reproducible: timings differ from run to run, and with them the lengths. With ``costs`` fixed, a sequence's lengths
    follow from its own past alone: the same seed gives the same text, alone or in a batch.

    Where costs are measured and drafting pays for nobody, one sequence at a time probes for all: at saturation a
    sequence's own probe would come up in almost every step, and each takes a pass of the draft that reads what was
    committed in between. So a probe goes on for a second round, which tells what drafting itself takes.
    """

    def __init__(
        self,
        max_length: int = 8,
        costs: tuple[float, float] | None = None,
        *,
        prior: float = 0.7,
        memory: float = 30.0,
        probe_every: int = 32,
    ) -> None:
        """
        Args:
            max_length: L.
            costs: seconds (or any unit: only their ratio counts) of drafting one token and of one target step; None
                measures them while running.
            prior: acceptance of a token before anything is known; worth two observations.
            memory: about how many observations of a position count; older ones fade.
            probe_every: rounds from one probe to the next.

        Raises ValueError for a value outside its range.
        """
        if max_length < 0:
            raise ValueError(f"max_length={max_length}: must be at least 0; use 0 for plain decoding")
        if costs is not None and not (costs[0] >= 0 and costs[1] > 0):
            raise ValueError(f"costs={costs}: need draft seconds >= 0 and target seconds > 0")
        if not 0 <= prior <= 1:
            raise ValueError(f"prior={prior}: must be in [0, 1]; it is an acceptance rate")
        if not memory >= 1 or probe_every < 2:
            raise ValueError(f"memory={memory}, probe_every={probe_every}: must be at least 1 and 2")
        self.max_length, self.costs = max_length, costs
        self.memory, self.probe_every = memory, probe_every
        self._prior = np.full(max_length, prior)
        self._everyone = Acceptance(max_length, 5 * memory)
        self._sequences: dict[int, _Sequence] = {}
        self._measured = StepCosts()
        self._steps = 0
        self._pays = False  # drafting did at the last look
        self._idle = 0  # steps since anybody drafted
        self._waited = 0  # plain steps taken to be timed

    def lengths(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[int]:
        states = [self._sequence(context) for context in contexts]
        allowed = [min(limit, self.max_length) for limit in limits]
        if self.costs is not None:
            best = best_lengths_alone(self._survival(states, self._prior), allowed, *self.costs).tolist()
        elif self._plain_step_due() or self._to_be_timed(len(contexts)):
            return [0] * len(contexts)
        else:
            survival = self._survival(states, self._everyone.rates(self._prior), _ALIKE)
            costs = self._measured
            gain, each = 1.0 if self._pays else _WORTHWHILE, costs.reading()
            reading = [each * state.unread(context) for state, context in zip(states, contexts, strict=True)]
            a_step = [seconds / min(limit + 1, _PAYBACK) for seconds, limit in zip(reading, limits, strict=True)]
            draft = costs.draft_token(len(states))
            best = best_lengths(survival, allowed, draft, costs.target, a_step, gain).tolist()
            self._pays = any(best)
            if not self._pays:
                return self._one_probes(states, allowed, reading)
            self._idle = 0
        return [
            state.next_length(length, limit, self.probe_every)
            for state, length, limit in zip(states, best, allowed, strict=True)
        ]

    def observe(
        self,
        contexts: Sequence[Context],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds_target: float | None,
        seconds_draft: float | None,
        prompt_rows: int = 0,
    ) -> None:
        states = [self._sequence(context) for context in contexts]
        twice = False
        if seconds_target is not None and seconds_draft is not None:
            twice = self.costs is None
            self._measured.observe(sum(drafted) + len(drafted), seconds_target, prompt_rows)
            if any(drafted):
                unread = sum(s.unread(c) for s, c, offered in zip(states, contexts, drafted, strict=True) if offered)
                self._measured.observe_draft(sum(k > 0 for k in drafted), max(drafted), unread, seconds_draft)
        for state, context, offered, passed in zip(states, contexts, drafted, accepted, strict=True):
            state.observe(context, offered, passed, twice)
            self._everyone.observe(offered, passed)

    def forget(self, context: Context) -> None:
        self._sequences.pop(context.id, None)

    def _sequence(self, context: Context) -> _Sequence:
        if context.id not in self._sequences:
            self._sequences[context.id] = _Sequence(Acceptance(self.max_length, self.memory))
        return self._sequences[context.id]

    @staticmethod
    def _survival(states: Sequence[_Sequence], prior: np.ndarray, weight: float = 2.0) -> np.ndarray:
        return np.stack([state.acceptance.survival(prior, weight) for state in states])

    def _one_probes(self, states: Sequence[_Sequence], allowed: Sequence[int], reading: Sequence[float]) -> list[int]:
        """[B] nobody drafts, but for the sequence that has waited longest, when a probe is due.

        ``reading`` [B]: seconds that a draft would have to read first.
        """
        self._idle += 1
        last = max(range(len(states)), key=lambda b: (allowed[b] > 0, states[b].keen, states[b].rounds))
        step = float(self._measured.target(np.array([len(states)]))[0])
        due = self._idle >= max(self.probe_every, reading[last] / (_PROBING * step)) or states[last].keen
        if due:
            self._idle = 0
        return [state.next_length(0, limit if due and b == last else 0, 1)
                for b, (state, limit) in enumerate(zip(states, allowed, strict=True))]  # fmt: skip

    def _to_be_timed(self, sequences: int) -> bool:
        """Plain steps of so many are still to be timed; not for ever, where steps are not timed or all read prompts."""
        self._waited = 0 if self._measured.knows(sequences) else self._waited + 1
        return 0 < self._waited <= _PATIENCE

    def _plain_step_due(self) -> bool:
        self._steps += 1
        return self._steps % self.probe_every == 2 % self.probe_every  # the first step also took in a prompt


class _Sequence:
    """What :class:`Adaptive` keeps of one sequence."""

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.rounds = 0  # since the last probe
        self.keen = False  # the last round's probe was worth another at once
        self._probing = False  # the length of the last round was a probe
        self._pause, self._read = math.inf, 0  # rounds since it last drafted, and its tokens then

    def unread(self, context: Context) -> int:
        """Tokens that the draft has to read before it can go on; what a round or two have added is not counted."""
        return 0 if self._pause <= 1 else len(context) - self._read

    def next_length(self, best: int, limit: int, probe_every: int) -> int:
        self.rounds += 1
        self._probing = (self.keen or self.rounds >= probe_every) and best < limit
        if self._probing:
            self.rounds = 0
        return best + self._probing

    def observe(self, context: Context, drafted: int, accepted: int, twice: bool) -> None:
        """``twice``: a probe after a pause is followed by another, whatever becomes of it."""
        self.acceptance.observe(drafted, accepted)
        if self._probing:
            self.keen = accepted == drafted or (twice and self._pause > 1)
        if drafted:
            self._pause, self._read = 0, len(context)
        else:
            self._pause += 1
        self._probing = False


class Acceptance:
    """Discounted counts of drafted tokens by position: reached (all before it accepted) and passed."""

    def __init__(self, positions: int, memory: float) -> None:
        self._keep = 1 - 1 / memory
        self._reached, self._passed = np.zeros(positions), np.zeros(positions)

    def observe(self, drafted: int, accepted: int) -> None:
        """A step that drafted so many tokens and accepted the first so many of them."""
        assert 0 <= accepted <= drafted
        if not drafted:
            return
        reached = slice(0, min(accepted + 1, drafted))
        self._reached[reached] = self._keep * self._reached[reached] + 1
        self._passed[reached] *= self._keep
        self._passed[:accepted] += 1

    def rates(self, prior: np.ndarray, weight: float = 2.0) -> np.ndarray:
        """[L] chance that a position passes once reached, with ``prior`` [L] worth ``weight`` observations."""
        return (self._passed + weight * prior) / (self._reached + weight)

    def survival(self, prior: np.ndarray, weight: float = 2.0) -> np.ndarray:
        """[L] chance that a position and all before it pass: never increasing."""
        return self.rates(prior, weight).cumprod()


def best_lengths_alone(survival: np.ndarray, limits: Sequence[int], draft_token: float, target: float) -> np.ndarray:
    """[B] draft lengths that maximise each sequence's own expected tokens a second, the shortest of equals.

        (1 + sum_{i <= K} S_i) / (T + d K)

    Args: as for :func:`best_lengths`, but the seconds T of a target step are the same for any number of rows.
    """
    lengths = np.arange(survival.shape[1] + 1)
    tokens = 1 + np.pad(survival.cumsum(1), ((0, 0), (1, 0)))
    rates = tokens / (target + draft_token * lengths)
    return np.where(lengths <= np.asarray(limits)[:, None], rates, -1.0).argmax(1)


def best_lengths(
    survival: np.ndarray,
    limits: Sequence[int],
    draft_token: float,
    target: Callable[[np.ndarray], np.ndarray],
    reading: Sequence[float] | None = None,
    worthwhile: float = 1.0,
) -> np.ndarray:
    """[B] draft lengths that maximise expected tokens a second of one step, the fewest drafted tokens of equals.

        (B + sum_b sum_{i <= K_b} S_bi) / (T(B + sum_b K_b) + d max_b K_b + sum_{b: K_b > 0} R_b)

    Drafting is batched, so its cost d is per token of the longest draft. Exact where nothing is to be read (R = 0): for
    a given longest draft and a given number of rows the best choice is the tokens likeliest to survive, and every such
    pair is looked at. With R, sequences are first left out whose tokens are not worth it at the plain step's rate.

    Args:
        survival: [B, L] chance that a position and all before it are accepted, never increasing along a row.
        limits: [B] longest draft of each sequence, at most L.
        draft_token: d, seconds. target: T, seconds of a target step from a number of rows, elementwise.
        reading: [B] R, seconds a step that drafting for a sequence takes besides.
        worthwhile: how many times the rate of a plain step any drafting must promise.
    """
    batch, longest = survival.shape
    besides = np.zeros(batch) if reading is None else np.asarray(reading)
    plain, doubled = target(np.array([batch, 2 * batch]))
    worth = np.maximum(survival - (doubled - plain) / plain, 0).sum(1)  # tokens, less what their rows take
    allowed = np.arange(longest) < np.asarray(limits)[:, None]
    allowed &= ((besides == 0) | (worth > besides * batch / plain))[:, None]
    best_rate, best = worthwhile * batch / plain, np.zeros(batch, dtype=np.int64)
    for length in range(1, max(limits, default=0) + 1):
        who, where = np.nonzero(allowed[:, :length])
        order = np.lexsort((where, -survival[who, where]))  # of equal chances the earlier position: prefixes stay whole
        who, where = who[order], where[order]
        gained = batch + survival[who, where].cumsum()
        read = np.where(where == 0, besides[who], 0).cumsum()
        rates = gained / (target(batch + 1 + np.arange(len(who))) + draft_token * length + read)
        most = rates.max(initial=0.0)
        if most > best_rate:
            best_rate = most
            best = np.bincount(who[: int(rates.argmax()) + 1], minlength=batch)
    return best
