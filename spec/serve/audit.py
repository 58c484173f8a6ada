"""Is what is served distributed as the target's? Asked of every draft before it serves, and of a share of live answers.

Both score tokens with the plain target (:mod:`spec.audit`): the first by a short audit of an engine of its own, the
second without end on what clients were sent. Which live answers, and in which order they may be looked at, is
:mod:`spec.audit.live`'s rule; here they are scored between steps of the engine, a few hundred tokens at a time.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from spec.audit.engines.ours import offsets
from spec.audit.live import Arrivals, Ticket
from spec.audit.sample import Sample
from spec.audit.scoring import Scored, Scorer
from spec.audit.statistical import PANEL, Settings, Watch, requests
from spec.engine import Engine
from spec.models.base import Step
from spec.request import Completion, Request, Result
from spec.serve.slices import Check, SelfTestFailed, completions

if TYPE_CHECKING:
    from spec.drafters.base import Drafter
    from spec.models.base import LanguageModel
    from spec.serve.log import RequestLog
    from spec.serve.metrics import AuditFigures
    from spec.serve.worker import Worker
    from spec.verify import Mode

TEXTS = (
    "The weather in the north of the country will be",
    "Tom has 3 apples and buys 4 more. How many apples has he?",
    "def mean(values):\n    return",
    "Once upon a time there was",
)
# Rounding may put two tokens in a thousand outside a cut-off law; a false alarm in a million starts.
SMOKE = Settings(delta=1e-6, epsilon=0.3, max_tokens=16, tolerance=2e-3)
_TOGETHER = 4  # sequences of a smoke audit at once
_MOST = 64  # tokens of a live answer that are looked at, from its first
_PART = 256  # tokens of a forward pass between two steps of the engine
_ELEMENTS = 1_000_000  # of a scored piece, see Scorer: every answer needs as much, so that memory soon stops growing
_LONGEST_PROMPT = 4096
_BACKLOG = 256  # chosen answers that wait for earlier ones to end, and as many that wait to be scored


def smoke_audit(
    target: LanguageModel, drafter: Drafter | None, mode: Mode, prompts: Sequence[Sequence[int]], tokens: int
) -> Check[None]:
    """Audits speculative decoding with ``drafter``, ``tokens`` at most, in parts; none for 0 tokens.

    Raises SelfTestFailed where the text is not the target's.
    """
    if tokens < 1:
        return
    watch, scorer = Watch(replace(SMOKE, tokens=tokens)), _StepScorer(target)
    engine = Engine(target, drafter, mode=mode, end_tokens=())
    panel = [p for p in PANEL if max(p.logit_bias, default=0) < target.vocab_size]
    coming = requests([prompt for prompt in prompts if prompt], panel, watch.settings)
    while watch.answer is None:
        asked = [replace(request, stop_token_ids=()) for request in itertools.islice(coming, _TOGETHER)]
        said = yield from completions(engine, asked)
        for request, completion in zip(asked, said, strict=True):
            sample = _sample(request, completion, mode)
            if sample is not None:
                watch.update([sample], (yield from scorer.score(sample)))
    if watch.answer == "different":
        sentence = watch.verdict(drafter.name if drafter else "no draft", {}).sentence()
        raise SelfTestFailed(f"the text with {drafter.name if drafter else 'no draft'} is {sentence}; not fit to serve")


class LiveAudit:
    """Audits ``share`` of the requests for as long as the server runs; in the engine's thread alone.

    Greedy requests (nothing is drawn), those under a grammar (which the scorer does not know) and very long prompts
    are skipped, and of a request's samples the first is looked at. No draft is scored, so drafts may come and go.
    """

    def __init__(
        self, worker: Worker, share: float, figures: AuditFigures, log: RequestLog, lots: Random | None = None
    ):
        self._worker, self._share, self._figures, self._log = worker, share, figures, log
        self._mode = worker.engine.mode
        self._arrivals = Arrivals(share, waiting=_BACKLOG, random=lots or SystemRandom())
        self.watch = Watch(replace(SMOKE, tokens=2**62))
        self._scorer = _StepScorer(worker.engine.target)
        self._ready: deque[Sample] = deque()
        self._check: Check[None] | None = None
        self._scheduled = self._alarmed = self._failed = False

    def arrived(self, request: Request, clients_seed: bool) -> Callable[[Result], None]:
        """To be told of every request in the order in which the engine gets them; what it returns, of the result."""
        possible = auditable(request)
        if not possible:
            self._figures.skipped()
        # Even one that cannot be chosen is shown: a client's seed is used up by it.
        open = possible and len(self._ready) < _BACKLOG and not self._failed
        self._arrivals.share = self._share if open else 0.0
        ticket = self._arrivals.arrived(request.params, clients_seed=clients_seed)
        return lambda result: self._wake() if ticket is None else self._ended(ticket, result)

    def _wake(self) -> None:
        """Goes on with what waits, if anything does: between two steps from now."""
        if (self._check is not None or self._ready) and not self._scheduled:
            self._scheduled = True
            self._worker.call(lambda engine: self._advance())

    def _ended(self, ticket: Ticket, result: Result) -> None:
        sample = _sample(result.request, result.completions[0], self._mode, _MOST)
        if sample is None:
            self._figures.skipped()
        self._ready += self._arrivals.finished(ticket, sample)
        if self._failed:
            self._ready.clear()
        self._wake()

    def _advance(self) -> None:
        """One part. Without room it is tried again when a request has ended."""
        self._scheduled = False
        if self._check is None:
            self._check = self._looked_at(self._ready.popleft())
        begin = time.perf_counter()
        try:
            got_on = next(self._check)
        except StopIteration:
            self._check, got_on = None, True
        except Exception as error:  # no client's business; without this answer nothing can be said of later ones
            self._log.write("audit_failed", error=repr(error), message="answers are not audited any more")
            self._ready.clear()
            self._check, self._failed, got_on = None, True, False
        self._figures.spent(time.perf_counter() - begin)
        if got_on:
            self._wake()

    def _looked_at(self, sample: Sample) -> Check[None]:
        self.watch.update([sample], (yield from self._scorer.score(sample)))
        different = self.watch.evidence.reached is not None
        self._figures.looked(len(sample.token_ids), self.watch.log10_e, self.watch.epsilon, different)
        if different and not self._alarmed:
            self._alarmed = True
            self._log.write(
                "audit_different", tokens=self.watch.tokens, log10_e=round(self.watch.log10_e, 2),
                message="what is served is not distributed as the target's: restart with --draft-length 0, and find "
                "the fault with python -m spec.audit",
            )  # fmt: skip


def auditable(request: Request) -> bool:
    """By what is known before its first token."""
    return not (request.params.greedy or request.grammar or len(request.prompt_ids) > _LONGEST_PROMPT)


def _sample(request: Request, completion: Completion, mode: Mode, most: int | None = None) -> Sample | None:
    """The first ``most`` tokens that were drawn, however the text ended; None where there are none."""
    ids = tuple(completion.token_ids[:most])
    where = offsets(completion.from_draft[:most], mode)
    return Sample(tuple(request.prompt_ids), ids, request.params, where) if ids else None


class _StepScorer:
    """A scorer with a forward pass of a few hundred tokens between two yields. One sample at a time."""

    def __init__(self, target: LanguageModel):
        self._target, self._rows = target, _Rows(torch.zeros(0, target.vocab_size), target.vocab_size)
        self._scorer = Scorer(self._rows, elements=_ELEMENTS)

    def score(self, sample: Sample) -> Check[Scored]:
        self._rows.logits = yield from _logits(self._target, sample)
        return self._scorer.score([sample])


def _logits(target: LanguageModel, sample: Sample) -> Check[Tensor]:
    """[tokens of the sample, V] by teacher forcing. Yields False while the cache has no room."""
    text = [*sample.prompt_ids, *sample.token_ids][:-1]  # the row before each token
    first = len(sample.prompt_ids) - 1
    while (slot := target.open(len(text))) is None:
        yield False
    rows: list[Tensor] = []
    try:
        for start in range(0, len(text), _PART):
            part = text[start : start + _PART]
            wanted = np.arange(max(first - start, 0), len(part), dtype=np.int64)
            step = Step(
                token_ids=torch.tensor(part, device=target.device), slots=np.array([slot]), starts=np.array([start]),
                lengths=np.array([len(part)]), logit_rows=wanted,
            )  # fmt: skip
            rows.append(target.forward(step).clone())
            yield True
    finally:
        target.close(slot)
    return torch.cat(rows)


@dataclass
class _Rows:
    """Conditionals that are there already, of one sample."""

    logits: Tensor
    vocab_size: int

    def rows(self, samples: Sequence[Sample], most: int) -> Iterator[Tensor]:
        yield from self.logits.split(most)
