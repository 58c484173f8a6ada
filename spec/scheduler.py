"""Which sequences run, and how much of each enters the next forward pass: continuous batching.

Prefill and decoding are one thing here: a running sequence has tokens that the target has not cached yet, one while it
decodes and many while its prompt is read. Every pass takes all decoding sequences and up to ``prefill_tokens`` of
prompts. The part of a sequence that reaches its end also carries drafts and gets a verdict; so a prompt's last tokens
and the first drafts share a pass, and nothing depends on where a prompt was cut.

What a new prompt has in common with one that runs (a system prompt, or all of it) is copied, not read again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from spec.drafters.base import Drafter
from spec.kv_cache import best_source, common_prefix
from spec.models.base import LanguageModel
from spec.sequence import Sample


@dataclass(frozen=True)
class Turn:
    """A sequence's part of the next forward pass."""

    sample: Sample
    tokens: int  # of its pending ones, the first
    speaks: bool  # these are all of them: drafts follow, and a verdict
    prefill: bool


class Scheduler:
    """Waiting and running sequences, first come first served, and the slots the running ones hold."""

    def __init__(
        self, target: LanguageModel, drafter: Drafter | None, max_running: int, prefill_tokens: int, shares_target: bool
    ):
        self._target, self._drafter, self._shares_target = target, drafter, shares_target
        self._max_running, self._prefill_tokens = max_running, prefill_tokens
        self._waiting: deque[Sample] = deque()
        self._running: list[Sample] = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def running(self) -> int:
        """Sequences that hold slots."""
        return len(self._running)

    def add(self, samples: list[Sample]) -> None:
        """They wait for room."""
        self._waiting.extend(samples)

    def admit(self) -> list[tuple[Sample, str]]:
        """Starts waiting sequences while there is room; returns those that can never start, with the reason.

        Samples of one prompt wait for one of them to have read it; others may overtake them meanwhile.
        """
        refused: list[tuple[Sample, str]] = []
        put_off: list[Sample] = []
        while self._waiting and len(self._running) < self._max_running:
            sample = self._waiting.popleft()
            reader = max(self._running, key=lambda other: (_in_common(other, sample), other.cached), default=None)
            if reader is not None and _to_wait_for(reader, sample):
                put_off.append(sample)
                continue
            try:
                started = self._start(sample)
            except ValueError as error:
                refused.append((sample, str(error)))
                continue
            if not started:
                put_off.append(sample)
                break
        self._waiting.extendleft(reversed(put_off))
        return refused

    def plan(self) -> list[Turn]:
        """The next forward pass: every decoding sequence, and prompts as far as the budget goes."""
        turns, budget = [], self._prefill_tokens
        for sample in self._running:
            if sample.pending == 1:
                turns.append(Turn(sample, 1, True, False))
            elif budget:
                self._take_over(sample)
                pending = sample.pending
                tokens = min(pending, budget)
                budget -= tokens
                turns.append(Turn(sample, tokens, tokens == pending, True))
        return turns

    def release(self, sample: Sample) -> None:
        """It ended, wherever it was: its slots are free at once."""
        if sample in self._running:
            self._running.remove(sample)
            self._target.close(sample.slot)
            if sample.drafting and self._drafter is not None:
                self._drafter.close(sample.context)
        elif sample in self._waiting:
            self._waiting.remove(sample)

    def swap_drafter(self, drafter: Drafter | None) -> None:
        """Between steps: running sequences are closed at the old drafter and opened at the new one.

        One that the new drafter has no room for goes on plainly.
        """
        for sample in self._running:
            if sample.drafting and self._drafter is not None:
                self._drafter.close(sample.context)
            asked = sample.task.request.draft_length != 0
            sample.drafting = asked and drafter is not None and drafter.open(sample.context)
        self._drafter = drafter

    def _take_over(self, sample: Sample) -> None:
        """Copies what another one has read of the same prompt, as late as can be: of many that start at once, too."""
        others = (
            (other.slot, other.context.prompt_ids, other.cached) for other in self._running if other is not sample
        )
        slot, tokens = best_source(sample.context.prompt_ids, others)
        if tokens > sample.cached:
            self._target.fork(slot, sample.slot, tokens)
            sample.cached = tokens

    def _start(self, sample: Sample) -> bool:
        """False while there is no room. Raises ValueError where there never will be."""
        context = sample.context
        slot = self._target.open(context.capacity)
        if slot is None and not self._running and not self._shares_target:
            raise ValueError(
                f"{self._target.name} has no room for {context.capacity} tokens although nothing runs: ask for fewer "
                "max_tokens, or give its cache more memory"
            )
        if slot is None:
            return False
        if self._drafter is not None and sample.task.request.draft_length != 0:
            try:
                sample.drafting = self._drafter.open(context)
            except BaseException:
                self._target.close(slot)
                raise
            if not sample.drafting and self._running:
                self._target.close(slot)
                return False
        sample.slot = slot
        if sample.task.result.seconds_queued is None:
            sample.task.result.seconds_queued = sample.task.seconds()
        self._running.append(sample)
        return True


def _in_common(other: Sample, sample: Sample) -> int:
    """Tokens that both prompts begin with."""
    return min(common_prefix(other.context.prompt_ids, sample.context.prompt_ids), _shareable(sample))


def _to_wait_for(reader: Sample, sample: Sample) -> bool:
    """The whole prompt is being read already, and reading it again would take longer than a step of waiting."""
    shared = _in_common(reader, sample)
    missing = shared - reader.cached
    return shared == _shareable(sample) and missing > (0 if reader.task is sample.task else _READ_AT_ONCE)


_READ_AT_ONCE = 16  # tokens


def _shareable(sample: Sample) -> int:
    """Tokens of a prompt that can be taken over; the last is each one's own, for the logits it gives."""
    return len(sample.context.prompt_ids) - 1
