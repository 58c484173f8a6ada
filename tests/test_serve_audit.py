"""The audit of what is served: faulty drafts do not start, faulty answers raise an alarm, right ones never do."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.engine import Engine
from spec.params import Params
from spec.request import Request
from spec.serve.audit import LiveAudit, auditable, smoke_audit
from spec.serve.log import RequestLog
from spec.serve.metrics import Metrics
from spec.serve.slices import SelfTestFailed, run
from spec.serve.worker import Worker
from tests.spec_models import TableModel, random_logits

VOCABULARY = 16
PROMPTS = [[1, 2, 3], [4, 5, 4, 5], [7]]


class Misreporting(ModelDrafter):
    """Reports that its drafts were all but impossible: they are always accepted, so the text is the draft's."""

    def propose(self, contexts, lengths):
        drafts = super().propose(contexts, lengths)
        if drafts.probs is not None:
            drafts.probs[:] = 1e-6
        return drafts


def table(seed: int = 1, **options: int) -> TableModel:
    return TableModel(random_logits(VOCABULARY, seed), VOCABULARY, **options)


@pytest.mark.parametrize("mode", ("block", "token"))
def test_right_drafts_pass_the_audit_of_a_start_and_wrong_ones_do_not(mode) -> None:
    target, draft = table(), table(2)
    for drafter in (None, NgramDrafter(), ModelDrafter(draft, target)):
        run(smoke_audit(target, drafter, mode, PROMPTS, 256))
    with pytest.raises(SelfTestFailed, match="different from its target.*not fit to serve"):
        run(smoke_audit(target, Misreporting(draft, target), mode, PROMPTS, 256))
    assert not target.held and not draft.held


def test_an_audit_of_no_tokens_touches_nothing() -> None:
    target = table()
    run(smoke_audit(target, None, "block", PROMPTS, 0))
    assert not target.forwards


def test_it_waits_for_room_and_fails_where_there_never_is_any() -> None:
    target = table(slots=4)
    others = [target.open(10) for _ in range(4)]
    check = smoke_audit(target, None, "block", PROMPTS, 64)
    assert [next(check), next(check)] == [False, False] and not target.forwards
    for slot in others:
        assert slot is not None
        target.close(slot)
    assert next(check)
    check.close()
    assert not target.held
    with pytest.raises(SelfTestFailed, match="raise --cache-tokens"):
        run(smoke_audit(table(slots=1), None, "block", PROMPTS, 64))


# ------------------------------------------------------------------------------------------------------ live answers


class Live:
    """A worker with a live audit, and what came of it."""

    def __init__(self, share: float = 1.0, target: TableModel | None = None, drafter: str = "right", **options: Any):
        self.target = target or table()
        draft = table(2)
        made = {"right": ModelDrafter, "wrong": Misreporting}[drafter](draft, self.target)
        self.engine = Engine(self.target, made, draft_length=3, shares_target=True)
        self.worker = Worker(self.engine, max_running=64, max_waiting=10_000)
        self.metrics, self.lines = Metrics("m", lambda: self.engine.load), io.StringIO()
        self.audit = LiveAudit(self.worker, share, self.metrics.audit(), RequestLog(stream=self.lines), **options)
        self.worker.on_arrival = self.audit.arrived

    def serve(self, *batches: Sequence[Request], clients_seed: bool = False, cancel: int | None = None) -> None:
        """Batches one after the other, to their end and that of the audit; ``cancel``: the index of one cut short."""

        async def program() -> None:
            self.worker.start()
            try:
                for batch in batches:
                    jobs = [self.worker.submit([request], False, clients_seed) for request in batch]
                    if cancel is not None:
                        while len(self.target.forwards) < 100:
                            await asyncio.sleep(0.005)
                        jobs[cancel].cancel()
                    await asyncio.gather(*(job.wait() for job in jobs))
                await self.audited()
            finally:
                self.worker.stop()

        asyncio.run(asyncio.wait_for(program(), 60))
        assert self.worker.failure is None and not self.target.held

    async def audited(self) -> None:
        """Until nothing waits to be scored; asked in the engine's thread."""
        waits = True
        while waits:
            waits = await asyncio.wrap_future(
                self.worker.call(lambda engine: bool(self.audit._ready) or self.audit._check is not None)
            )

    def figure(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"spec_audit_{name}", {"model_name": "m"})
        assert value is not None
        return value


def asked(count: int, first: int = 0, **options: Any) -> list[Request]:
    params = [Params(seed=first + i, temperature=(1.0, 0.7)[i % 2]) for i in range(count)]
    return [Request([1 + i % 5, 2], p, max_tokens=8, **options) for i, p in enumerate(params)]


def test_right_answers_are_scored_and_raise_no_alarm() -> None:
    live = Live()
    live.serve(asked(50), asked(50, 50))
    assert live.figure("samples_total") == 100 and live.figure("tokens_total") == 800 == live.audit.watch.tokens
    assert live.figure("different") == 0 and live.figure("epsilon") < 1 and not live.lines.getvalue()
    assert live.figure("seconds_total") > 0 and live.figure("skipped_total") == 0


def test_wrong_answers_raise_one_alarm() -> None:
    live = Live(drafter="wrong")
    live.serve(asked(60), asked(60, 60))
    lines = [json.loads(line) for line in live.lines.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["audit_different"] and live.figure("different") == 1
    assert live.figure("log10_e") > 6 and lines[0]["tokens"] < 1500


def test_a_share_is_chosen_by_lot_at_arrival() -> None:
    """The lots alone decide: which they are is known before anything is served."""
    live = Live(0.3, lots=random.Random(5))
    fed: list[int] = []
    update = live.audit.watch.update
    live.audit.watch.update = lambda samples, scored: (fed.extend(s.params.seed for s in samples),
                                                       update(samples, scored))[1]  # fmt: skip
    live.serve(asked(60))
    lots = random.Random(5)
    assert fed == [i for i in range(60) if lots.random() < 0.3] and 5 < len(fed) < 40


def test_answers_are_looked_at_in_the_order_of_arrival_not_of_their_ends() -> None:
    live = Live()
    fed: list[int] = []
    update = live.audit.watch.update
    live.audit.watch.update = lambda samples, scored: (fed.extend(len(s.token_ids) for s in samples),
                                                       update(samples, scored))[1]  # fmt: skip
    lengths = [30, 2, 11, 1, 20, 3]
    live.serve([Request([1], Params(seed=i), max_tokens=length) for i, length in enumerate(lengths)])
    assert fed == lengths


def test_what_a_client_cut_short_is_looked_at_as_far_as_it_came() -> None:
    live = Live()
    live.serve([Request([1], Params(seed=1), max_tokens=9000), *asked(3)], cancel=0)
    assert live.figure("samples_total") == 4
    assert live.figure("tokens_total") == 64 + 24  # the first tokens of a long answer are enough


def test_seeds_that_clients_repeat_are_looked_at_once_and_the_servers_own_always() -> None:
    live = Live()
    twice = [replace(request, params=replace(request.params, seed=3)) for request in asked(4)]
    live.serve(twice, clients_seed=True)
    assert live.figure("samples_total") == 1
    own = Live()
    own.serve(twice)
    assert own.figure("samples_total") == 4


def test_greedy_and_very_long_requests_are_skipped() -> None:
    live = Live()
    live.serve([Request([1, 2], Params(temperature=0), max_tokens=4), *asked(2)])
    assert live.figure("samples_total") == 2 and live.figure("skipped_total") == 1
    assert not auditable(Request([1] * 5000, Params()))
    assert not auditable(Request([1], Params(), grammar=object()))  # type: ignore[arg-type]


def test_scoring_waits_for_room_in_the_cache() -> None:
    """Two slots, both in use whenever anything runs: all are scored in the end."""
    live = Live(target=table(slots=2))
    live.serve(asked(12))
    assert live.figure("samples_total") == 12


def test_an_audit_that_fails_leaves_the_server_alone() -> None:
    live = Live()
    live.audit._scorer._scorer.score = lambda samples: 1 / 0  # type: ignore[method-assign]
    live.serve(asked(5), asked(5, 5))
    assert [json.loads(line)["event"] for line in live.lines.getvalue().splitlines()] == ["audit_failed"]
    assert live.figure("samples_total") == 0


@pytest.mark.parametrize("drafter", ("right", "wrong"))
def test_the_alarm_holds_across_a_swap(drafter: str) -> None:
    """No draft is scored: whichever drafts, the law is the target's, or the alarm says so."""
    live = Live(drafter=drafter)

    async def program() -> None:
        live.worker.start()
        try:
            for round in range(6):
                jobs = [live.worker.submit([request], False) for request in asked(20, 20 * round)]
                live.worker.call(lambda engine, round=round: engine.swap_drafter(
                    NgramDrafter() if round % 2 else live.engine.drafter, 3))  # fmt: skip
                await asyncio.gather(*(job.wait() for job in jobs))
            await live.audited()
        finally:
            live.worker.stop()

    first = live.engine.drafter
    asyncio.run(asyncio.wait_for(program(), 60))
    assert first is not None and live.figure("samples_total") == 120
    assert live.figure("different") == (drafter == "wrong")


def test_teacher_forcing_in_parts_gives_the_rows_of_one_pass(monkeypatch) -> None:
    """Parts of five tokens that cut prompt and text anywhere."""
    from spec.audit.sample import Sample
    from spec.serve import audit

    monkeypatch.setattr(audit, "_PART", 5)
    target, logits = table(), random_logits(VOCABULARY, 1)
    for prompt in range(1, 12):
        text = tuple(int(t) for t in np.random.default_rng(prompt).integers(0, VOCABULARY, prompt + 7))
        rows = run(audit._logits(target, Sample(text[:prompt], text[prompt:], Params())))
        expected = torch.tensor(np.array([logits(text[: prompt + i]) for i in range(7)]))
        assert torch.equal(rows, expected)
