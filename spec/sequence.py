"""A request on its way through the engine: its samples, what each has committed, and the text of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spec.drafters.base import Context
from spec.request import Completion, Event, FinishReason, Request, Result, TokenLogprob, sample_seed
from spec.text import Detokenizer, StopStrings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnToken = Callable[[Event], None]
OnDone = Callable[[Result], None]


@dataclass(eq=False)
class Task:
    """A request in the engine, until its last sample ends."""

    id: int
    request: Request
    result: Result
    on_token: OnToken | None = None
    on_done: OnDone | None = None
    samples: list[Sample] = field(default_factory=list)  # those that have not ended
    began: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Since the request was added."""
        return time.perf_counter() - self.began


@dataclass(eq=False)
class Sample:
    """One sequence: what a drafter sees of it (``context``), where it is cached, and how it may end."""

    context: Context
    completion: Completion  # its token_ids are the context's output_ids: one list
    task: Task
    index: int
    stop_tokens: frozenset[int]
    tokenizer: PreTrainedTokenizerBase | None
    stops: StopStrings
    detokenizer: Detokenizer | None  # None: nobody needs the text before the end
    slot: int = -1  # of the target's cache
    cached: int = 0  # tokens there that stand
    drafting: bool = False  # the drafter knows it

    @property
    def pending(self) -> int:
        """Tokens the target has not cached: 1 while decoding."""
        return len(self.context) - self.cached

    @property
    def most_drafts(self) -> int:
        """A block of K drafts commits up to K + 1 tokens; more would pass max_tokens or the context."""
        return self.context.capacity - len(self.context) - 1

    def commit(
        self, tokens: list[int], accepted: int, drafted: int, logprobs: list[TokenLogprob] | None
    ) -> list[Event]:
        """Takes a verified block, as far as the text goes: of ``drafted`` tokens the first ``accepted`` stood.

        ``tokens`` are these and, unless its logits were not finite, the target's own. Returns one event a token taken;
        a finish reason in the last one says that the text ends there.
        """
        events: list[Event] = []
        for i, token in enumerate(tokens):
            events.append(self._extend(token, i < accepted, logprobs[i] if logprobs else None))
            if events[-1].finish_reason is not None:
                break
        self.context.round += 1
        self.completion.target_steps += 1
        if len(events) <= accepted:  # it ended within the drafts: the rest of them is counted nowhere
            drafted = len(events)
        self._count(drafted, min(len(events), accepted))
        if events:
            events[0] = replace(events[0], drafted=drafted)
        self.cached = len(self.context) - 1  # roll back: rejected tokens will be written over
        return events

    def end(self, reason: FinishReason, error: str | None = None) -> Event:
        """Ends it from outside; what was held back is shown."""
        text = self._held_text()
        self.completion.text += text
        return Event(self.index, None, text=text, finish_reason=reason, error=error)

    def close(self, reason: FinishReason, error: str | None = None) -> None:
        """Fills in what a completion has at its end only."""
        completion = self.completion
        completion.finish_reason, completion.error = reason, error
        if self.tokenizer is not None and self.detokenizer is None:
            ids = completion.token_ids
            kept = ids[:-1] if ids and ids[-1] in self.stop_tokens else ids
            skip = not self.task.request.special_tokens
            completion.text = str(self.tokenizer.decode(kept, skip_special_tokens=skip))

    def _extend(self, token: int, from_draft: bool, logprob: TokenLogprob | None) -> Event:
        completion = self.completion
        self.context.output_ids.append(token)
        completion.from_draft.append(from_draft)
        if logprob is not None and completion.logprobs is not None:
            completion.logprobs.append(logprob)
        ends, text = token in self.stop_tokens, ""
        if self.detokenizer is not None and not ends:
            text = self.stops.push(self.detokenizer.push(token))
        reason: FinishReason | None = None
        if ends or self.stops.stopped:
            reason = "stop"
        elif len(self.context) >= self.context.capacity:
            reason = "length"
        if reason is not None:
            text += self._held_text()
        completion.text += text
        return Event(self.index, token, from_draft, text=text, logprob=logprob, finish_reason=reason)

    def _held_text(self) -> str:
        """What was held back and is shown after all, because the text ends; a stop string in it is still obeyed."""
        if self.detokenizer is None or self.stops.stopped:
            return ""
        return self.stops.push(self.detokenizer.flush()) + self.stops.flush()

    def _count(self, drafted: int, accepted: int) -> None:
        for counts, size in ((self.completion.drafted, drafted), (self.completion.accepted, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for i in range(size):
                counts[i] += 1


def open_samples(
    task: Task, ids: Iterator[int], limit: int, stop_tokens: frozenset[int], tokenizer: PreTrainedTokenizerBase | None
) -> list[Sample]:
    """The n samples of a checked request. ``limit``: of the target's context. ``ids``: unused numbers.

    Raises ValueError for a grammar whose end would not end the text.
    """
    request, prompt = task.request, tuple(int(token) for token in task.request.prompt_ids)
    streams = task.on_token is not None or bool(request.stop)
    if request.grammar is not None and not request.grammar.end_tokens <= stop_tokens:
        raise ValueError(
            "a text under a grammar ends with the model's own end of text: leave stop_token_ids unset, or name in it "
            f"{', '.join(map(str, sorted(request.grammar.end_tokens)))} too (over HTTP: no ignore_eos)"
        )
    for index, completion in enumerate(task.result.completions):
        params = request.params
        if index:
            params = replace(params, seed=sample_seed(params.seed, index))
        capacity = min(len(prompt) + request.max_tokens, limit)
        constraint = None if request.grammar is None else request.grammar.start()
        task.samples.append(
            Sample(
                Context(next(ids), params, prompt, completion.token_ids, capacity=capacity, constraint=constraint),
                completion,
                task,
                index,
                stop_tokens,
                tokenizer,
                StopStrings(request.stop),
                Detokenizer(tokenizer, request.special_tokens) if streams and tokenizer is not None else None,
            )
        )
    return task.samples
