"""Propose, verify, commit: speculative decoding of many requests at once, distributed exactly as the target alone.

One :meth:`Engine.step` is one forward pass of the target over all running sequences: prompts are read in parts, and
every sequence whose text is read gets its drafts verified and commits between one and K + 1 tokens.

Why the output is exact, whatever the draft lengths and however a block ends:

- verification is (:mod:`spec.verify`), with the same processing on every row, histories with drafted tokens included;
- a draft length is chosen from what was committed before, costs and past verdicts, never from the block it is for:
  given that past, the block's law is the target's for every length, so it is for any such choice among lengths;
- a block that holds a stop token (or string, or the last allowed token) is cut there. What is kept is a prefix of a
  text distributed as the target's, ended where plain decoding of the same text would end it: stopping is a function of
  the text up to that point, and what was dropped is looked at by nobody;
- a constraint (:mod:`spec.constraint`) is part of the target: its mask is a function of the text before each row;
- logits that are not finite end the texts that come to them, and no other (:func:`spec.rows.decide`);
- noise is keyed by the request's seed, output position, round and purpose (:mod:`spec.random`): same seed, same text,
  whatever else is in the batch. With draft length 0 only the TARGET stream is used: plain decoding is this engine
  without drafts. (Two things can still tell batches apart: rounding in the forward pass, where a decision is nearly
  tied; and a draft length that adapts to measured time, which changes the text but not its law.)

Requests with the same prompt, parameters and seed get the same text: give each its own seed.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from spec.drafters.base import Drafter
from spec.models.base import LanguageModel, Step
from spec.progress import bar
from spec.proposals import Proposal, Proposer
from spec.request import Completion, FinishReason, Request, Result
from spec.rows import LogprobSource, Verdict, decide, logprobs
from spec.scheduler import Scheduler, Turn
from spec.sequence import OnDone, OnToken, Sample, Task, open_samples
from spec.verify import Mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spec.draft_length import DraftLength


class Engine:
    """Decodes requests with a target and, optionally, a drafter. Not thread-safe: one thread drives it.

    Args:
        target, drafter: see :mod:`spec.models.base` and :mod:`spec.drafters.base`; no drafter: plain decoding.
        tokenizer: the target's, for text and stop strings; without one results hold token ids only.
        draft_length: how many tokens to draft, a number or a policy (:mod:`spec.draft_length`).
        mode: ``block`` or ``token`` verification (:mod:`spec.verify`).
        max_running: sequences that run at once; the others wait.
        prefill_tokens: prompt tokens a step, so that long prompts do not hold up those who decode.
        logprobs: of which law reported log-probs are, ``raw`` or ``processed``: see :func:`spec.rows.logprobs`.
        end_tokens: what ends a text unless a request says otherwise; by default the target's and the tokenizer's.
        shares_target: others open slots of the target too, and give them back: a sequence without room waits for that,
            though nothing runs here. It must fit into an empty cache.

    Raises ValueError for a setting outside its range.
    """

    def __init__(
        self,
        target: LanguageModel,
        drafter: Drafter | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        draft_length: DraftLength | int = 4,
        mode: Mode = "block",
        max_running: int = 64,
        prefill_tokens: int = 512,
        logprobs: LogprobSource = "raw",
        end_tokens: Sequence[int] | None = None,
        shares_target: bool = False,
    ):
        for name, value in (("max_running", max_running), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        for name, choice, choices in (
            ("mode", mode, ("block", "token")),
            ("logprobs", logprobs, ("raw", "processed")),
        ):
            if choice not in choices:
                raise ValueError(f"{name}={choice!r}: choose {' or '.join(choices)}")
        self.target, self.drafter, self.tokenizer, self.mode = target, drafter, tokenizer, mode
        self._logprobs: LogprobSource = logprobs
        self._end_tokens = frozenset(ending_tokens(target, tokenizer) if end_tokens is None else end_tokens)
        self._proposer = Proposer(drafter, _policy(draft_length), target.device)
        self._scheduler = Scheduler(target, drafter, max_running, prefill_tokens, shares_target)
        self._tasks: dict[int, Task] = {}
        self._task_ids, self._sample_ids = itertools.count(), itertools.count()
        self._calls: deque[Callable[[], None]] = deque()  # callbacks that wait for the end of the step

    @property
    def busy(self) -> bool:
        """Whether :meth:`step` has something to do."""
        return bool(self._tasks or self._calls)

    @property
    def load(self) -> tuple[int, int]:
        """Sequences that run and sequences that wait. May be read from any thread."""
        running = self._scheduler.running
        return running, max(len(self._scheduler) - running, 0)

    def generate(self, requests: Sequence[Request], progress: bool = False) -> list[Result]:
        """Runs requests to their end; results in the order given.

        A request that cannot run has completions with ``finish_reason`` "error" and the reason; the others run on.
        """
        results: dict[int, Result] = {}
        with bar(len(requests), progress) as advance:

            def done(i: int, result: Result) -> None:
                results[i] = result
                advance(result)

            for i, request in enumerate(requests):
                try:
                    self.add(request, on_done=partial(done, i))
                except ValueError as error:
                    count = max(request.n, 1) if isinstance(request.n, int) else 1
                    failed = [Completion(finish_reason="error", error=str(error)) for _ in range(count)]
                    done(i, Result(request, failed))
            while len(results) < len(requests):
                self.step()
        return [results[i] for i in range(len(requests))]

    def add(self, request: Request, on_token: OnToken | None = None, on_done: OnDone | None = None) -> int:
        """Queues a request and returns its number. Callbacks run at the end of a :meth:`step`, tokens before done.

        A callback may call :meth:`add` and :meth:`cancel`. If it raises, the step raises, the engine is whole and the
        callbacks after it run with the next step.

        Raises ValueError for what the target cannot do: see :meth:`spec.request.Request.check`.
        """
        limit = self.target.max_positions
        request.check(self.target.vocab_size, limit, has_text=self.tokenizer is not None)
        completions = [Completion(logprobs=None if request.logprobs is None else []) for _ in range(request.n)]
        task = Task(next(self._task_ids), request, Result(request, completions), on_token, on_done)
        stop_tokens = self._end_tokens if request.stop_token_ids is None else frozenset(request.stop_token_ids)
        self._scheduler.add(open_samples(task, self._sample_ids, limit, stop_tokens, self.tokenizer))
        self._tasks[task.id] = task
        return task.id

    def cancel(self, id: int) -> None:
        """Ends a request and frees its slots at once; its callbacks run with the next step.

        What it has generated stays in its result. Nothing happens if it has ended already.
        """
        task = self._tasks.get(id)
        for sample in list(task.samples) if task else ():
            self._end(sample, "cancelled")

    def swap_drafter(self, drafter: Drafter | None, draft_length: DraftLength | int = 4) -> None:
        """Between steps: drafts come from ``drafter`` from now on, as many as the new policy says.

        Whatever runs goes on and is drafted for by the new one, or finishes plainly where that has no room. Every step
        has the target's law whoever drafts (module docstring), so the text has it across the swap too.
        """
        self._scheduler.swap_drafter(drafter)
        self.drafter, self._proposer = drafter, Proposer(drafter, _policy(draft_length), self.target.device)

    def step(self) -> bool:
        """One forward pass of the target, over everything that runs. Returns whether there is work left."""
        for sample, reason in self._scheduler.admit():
            self._end(sample, "error", reason)
        turns = self._scheduler.plan()
        if turns:
            self._advance(turns)
        while self._calls:
            self._calls.popleft()()
        return self.busy

    def _advance(self, turns: Sequence[Turn]) -> None:
        """Propose, verify, commit."""
        speaking = [turn.sample for turn in turns if turn.speaks]
        proposal = self._proposer.propose(speaking)
        begin = time.perf_counter()
        logits = self.target.forward(_step(turns, proposal))
        for turn in turns:
            turn.sample.cached += turn.tokens
        if not speaking:
            return
        contexts = [sample.context for sample in speaking]
        verdict = decide(logits, contexts, proposal.drafts, proposal.tokens, self.mode)
        seconds = time.perf_counter() - begin
        prompt_rows = sum(turn.tokens for turn in turns) - len(speaking)
        self._proposer.observe(speaking, proposal, verdict.accepted, seconds, prompt_rows)
        for b, sample in enumerate(speaking):
            ended = self._commit(sample, b, proposal, verdict)
            if ended is not None:
                self._close(sample, ended)
            elif verdict.tokens[b] is None:
                self._end(sample, "error", _why(sample, self.target.name))
            elif b in proposal.asked:
                self._proposer.commit(sample, verdict.accepted[b])

    def _commit(self, sample: Sample, b: int, proposal: Proposal, verdict: Verdict) -> FinishReason | None:
        """Takes what the verdict says of sequence b of the step. Returns why the text ends with it, if it does."""
        task, accepted, own = sample.task, verdict.accepted[b], verdict.tokens[b]
        tokens = proposal.of(b, accepted) if own is None else [*proposal.of(b, accepted), own]
        if not tokens:
            return None
        values = None
        if task.request.logprobs is not None:
            values = logprobs(verdict, b, tokens, task.request.logprobs, sample.context.params, self._logprobs)
        events = sample.commit(tokens, accepted, proposal.lengths[b], values)
        if task.result.seconds_to_first_token is None:
            task.result.seconds_to_first_token = task.seconds()
        if task.on_token is not None:
            self._calls.extend(partial(task.on_token, event) for event in events)
        return events[-1].finish_reason

    def _end(self, sample: Sample, reason: FinishReason, error: str | None = None) -> None:
        """Ends a sample for a reason that is not in its text."""
        event = sample.end(reason, error)
        if sample.task.on_token is not None:
            self._calls.append(partial(sample.task.on_token, event))
        self._close(sample, reason, error)

    def _close(self, sample: Sample, reason: FinishReason, error: str | None = None) -> None:
        """Frees what a sample holds; its request is done when it was the last."""
        self._scheduler.release(sample)
        self._proposer.forget(sample)
        sample.close(reason, error)
        task = sample.task
        task.samples.remove(sample)
        if not task.samples:
            task.result.seconds = task.seconds()
            del self._tasks[task.id]
            if task.on_done is not None:
                self._calls.append(partial(task.on_done, task.result))


_NOT_FINITE = (
    "{name}: non-finite logits at position {at} of the sequence. Check the weights for NaN, try float32, or widen the "
    "allowed tokens if a mask left none."
)


def _why(sample: Sample, target: str) -> str:
    """Why no token can follow what a sample has."""
    context = sample.context
    failure = None if context.constraint is None else context.constraint.failure(len(context.output_ids))
    return failure or _NOT_FINITE.format(name=target, at=len(context) - 1)


def _step(turns: Sequence[Turn], proposal: Proposal) -> Step:
    """Every turn's pending tokens, drafts behind those that speak, logits from their last pending token on."""
    ids: list[int] = []
    rows: list[int] = []
    lengths: list[int] = []
    at = b = 0
    for turn in turns:
        sample, before = turn.sample, len(ids)
        ids += sample.context.tokens(sample.cached, sample.cached + turn.tokens)
        if turn.speaks:
            size = proposal.lengths[b]
            rows.extend(range(len(ids) - 1, len(ids) + size))
            ids += proposal.tokens[at : at + size]
            at, b = at + size, b + 1
        lengths.append(len(ids) - before)
    return Step(
        token_ids=torch.tensor(ids, device=proposal.drafts.ids.device),
        slots=np.array([turn.sample.slot for turn in turns]),
        starts=np.array([turn.sample.cached for turn in turns]),
        lengths=np.array(lengths),
        logit_rows=np.array(rows, dtype=np.int64),
    )


def _policy(draft_length: DraftLength | int) -> DraftLength:
    if not isinstance(draft_length, int):
        return draft_length
    from spec.draft_length import Fixed

    return Fixed(draft_length)


def ending_tokens(target: LanguageModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """What ends a text unless a request says otherwise: the target's end tokens and the tokenizer's."""
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return frozenset((*target.end_tokens, *own))
