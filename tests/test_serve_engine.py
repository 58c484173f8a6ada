"""Beneath the server: drafts swapped while sequences run, the engine's thread, and the checks of a draft."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest
import torch

from spec.drafters.base import Drafter
from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.engine import Engine
from spec.params import Params
from spec.request import Event, Request, Result
from spec.serve import respond
from spec.serve.drafts import Drafts, Loaded
from spec.serve.errors import ApiError
from spec.serve.respond import _in_time
from spec.serve.selftest import check_drafter, check_greedy, greedy_check
from spec.serve.slices import SelfTestFailed
from spec.serve.worker import Busy, EngineFailed, Job, Worker
from spec.verify import Mode
from tests.enumerate_engine import Branches, Text, text_law
from tests.spec_models import TableModel, random_logits

PROMPT = (0, 1)


def softmax(logits) -> torch.Tensor:
    return torch.tensor(logits).softmax(-1).numpy()


@pytest.mark.parametrize("mode", ("token", "block"))
@pytest.mark.parametrize("swap_after", (1, 2))
def test_the_joint_law_is_the_targets_across_a_swap(mode: Mode, swap_after: int, monkeypatch) -> None:
    """Every path of a text that one draft begins and another, with another length, goes on with."""
    target, first, second = (random_logits(2, seed) for seed in (1, 2, 3))
    request = Request(PROMPT, max_tokens=4, stop_token_ids=(0,))

    def program() -> Text:
        model = TableModel(target, 2)
        engine = Engine(model, ModelDrafter(TableModel(first, 2), model), draft_length=1, mode=mode)
        results: list[Result] = []
        engine.add(request, on_done=results.append)
        for _ in range(swap_after):
            engine.step()
        engine.swap_drafter(ModelDrafter(TableModel(second, 2), model), 2)
        while engine.step():
            pass
        return tuple(results[0].completions[0].token_ids)

    law = Branches(monkeypatch).law(program)
    exact = text_law(lambda text: softmax(target(PROMPT + text)), 4, stops=frozenset({0}))
    assert law.keys() == exact.keys()
    assert max(abs(law[text] - exact[text]) for text in exact) < 1e-12


def test_a_swap_leaves_no_slot_behind_and_drafts_go_on() -> None:
    """Greedy texts are unmoved; a perfect draft taking over saves steps; every slot of both drafts is free at the end.

    One request is plain by its own wish: no draft ever opens it.
    """
    target = random_logits(16, 1)
    model, bad, good = TableModel(target, 16), TableModel(random_logits(16, 2), 16), TableModel(target, 16)
    requests = [Request([i, 3], Params(temperature=0), 40, draft_length=0 if i == 2 else None) for i in range(4)]
    plain = Engine(model).generate(requests)
    engine = Engine(model, ModelDrafter(bad, model), draft_length=3)
    results: dict[int, Result] = {}
    for i, request in enumerate(requests):
        engine.add(request, on_done=lambda result, i=i: results.__setitem__(i, result))
    for _ in range(4):
        engine.step()
    assert len(bad.held) == 3
    engine.swap_drafter(ModelDrafter(good, model), 3)
    assert len(bad.held) == 0 and len(good.held) == 3
    while engine.step():
        pass
    assert [results[i].completions[0].token_ids for i in range(4)] == [r.completions[0].token_ids for r in plain]
    assert results[0].completions[0].target_steps < 20 and results[2].completions[0].target_steps == 40
    assert not model.held and not good.held and not bad.held


def test_a_draft_without_room_leaves_running_sequences_plain() -> None:
    model = TableModel(random_logits(8, 1), 8)
    engine = Engine(model, NgramDrafter())
    results: list[Result] = []
    for i in range(3):
        engine.add(Request([i, 3], Params(temperature=0), 20), on_done=results.append)
    engine.step()
    small = TableModel(random_logits(8, 1), 8, slots=1)
    engine.swap_drafter(ModelDrafter(small, model))
    while engine.step():
        pass
    assert sorted(sum(r.completions[0].accepted) > 0 for r in results) == [False, False, True]
    assert not small.held and all(len(r.completions[0].token_ids) == 20 for r in results)


# ------------------------------------------------------------------------------------------------------ the thread


def serving(engine: Engine, program: Callable[[Worker], object], **options: int) -> object:
    """Runs an async program with a worker around it."""
    worker = Worker(engine, **{"max_running": 4, "max_waiting": 4, **options})

    async def run() -> object:
        worker.start()
        try:
            return await asyncio.wait_for(program(worker), 30)
        finally:
            worker.stop()

    return asyncio.run(run())


def test_tokens_come_in_order_and_results_last() -> None:
    engine = Engine(TableModel(random_logits(8, 1), 8))

    async def program(worker: Worker) -> None:
        job = worker.submit([Request([1], Params(seed=s), 9, n=2) for s in (1, 2)], stream=True)
        tokens: dict[tuple[int, int], list[int]] = {}
        async for batch in job.batches():
            for index, item in batch:
                if isinstance(item, Event):
                    tokens.setdefault((index, item.sample), []).append(item.token_id)
        for index, result in enumerate(job.results):
            assert [tokens[index, i] for i in range(2)] == [c.token_ids for c in result.completions]
        assert job.ended and len(tokens) == 4

    serving(engine, program)


def test_a_full_queue_refuses_and_room_comes_back() -> None:
    model = TableModel(random_logits(8, 1), 8)
    engine = Engine(model, max_running=2)

    async def program(worker: Worker) -> None:
        request = Request([1], max_tokens=9000, n=3)
        job = worker.submit([request], stream=False)
        with pytest.raises(Busy) as busy:
            worker.submit([request], stream=False)
        assert busy.value.retry_after >= 1
        job.cancel()
        results = await job.wait()
        assert [c.finish_reason for c in results[0].completions] == ["cancelled"] * 3 and not model.held
        assert len((await worker.submit([Request([1], max_tokens=3)], stream=False).wait())[0].completions) == 1

    serving(engine, program, max_running=2, max_waiting=2)


def test_a_failing_engine_tells_everybody_and_takes_no_more() -> None:
    calls = 0

    def logits(text: tuple[int, ...]):
        nonlocal calls
        calls += 1
        if calls > 5:
            raise RuntimeError("the device is gone")
        return random_logits(8, 1)(text)

    failures: list[BaseException] = []

    async def program(worker: Worker) -> None:
        worker.on_failure = failures.append
        jobs = [worker.submit([Request([1], max_tokens=50)], stream=stream) for stream in (False, True)]
        for job in jobs:
            with pytest.raises(EngineFailed, match="RuntimeError"):
                await job.wait()
        assert not worker.alive and "device" in str(worker.failure)
        with pytest.raises(EngineFailed):
            worker.submit([Request([1])], stream=False)

    serving(Engine(TableModel(logits, 8)), program)
    assert len(failures) == 1


def test_a_stopped_worker_leaves_nobody_waiting() -> None:
    async def program(worker: Worker) -> None:
        job = worker.submit([Request([1], max_tokens=9000)], stream=False)
        await asyncio.sleep(0.05)
        worker.stop()
        with pytest.raises(EngineFailed, match="shutting down"):
            await job.wait()

    serving(Engine(TableModel(random_logits(8, 1), 8)), program)


def test_a_cancelled_call_is_left_out_and_the_engine_lives() -> None:
    ran: list[int] = []

    async def program(worker: Worker) -> None:
        gate = threading.Event()
        worker.call(lambda engine: gate.wait(5))
        left = worker.call(lambda engine: ran.append(1))
        assert left.cancel()
        gate.set()
        assert await asyncio.wrap_future(worker.call(lambda engine: 7)) == 7 and worker.alive and not ran
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(worker.call(lambda engine: 1 // 0))
        assert worker.alive

    serving(Engine(TableModel(random_logits(8, 1), 8)), program)


def test_calls_that_a_failing_engine_leaves_behind_end_too() -> None:
    async def program(worker: Worker) -> None:
        gate, dead = threading.Event(), RuntimeError("the device is gone")

        def fail() -> bool:
            gate.wait(5)
            raise dead

        worker.engine.step = fail  # type: ignore[method-assign]
        worker.submit([Request([1], max_tokens=5)], stream=False)
        await asyncio.sleep(0.05)  # it waits in the step
        waiting, cancelled = worker.call(lambda engine: 1), worker.call(lambda engine: 2)
        cancelled.cancel()
        gate.set()
        with pytest.raises(EngineFailed, match="RuntimeError"):
            await asyncio.wrap_future(waiting)
        with pytest.raises(EngineFailed, match="not running"):
            await asyncio.wrap_future(worker.call(lambda engine: 3))

    serving(Engine(TableModel(random_logits(8, 1), 8)), program)


def test_a_client_that_reads_nothing_holds_no_slots_past_the_limit(monkeypatch) -> None:
    """Its buffers are full: nothing that is sent gets through. What it held is free, and nobody waits for long."""
    monkeypatch.setattr(respond, "_LAST_SECONDS", 1.5)
    model = TableModel(random_logits(8, 1), 8)
    notes: dict[str, object] = {}

    async def chunks(job: Job) -> AsyncIterator[dict[str, object]]:
        async for _ in job.batches():
            yield {}

    async def program(worker: Worker) -> None:
        job = worker.submit([Request([1], max_tokens=9000)], stream=True)
        stuck = asyncio.Event()

        async def send(message: dict[str, object]) -> None:
            if message["type"] == "http.response.body":
                await stuck.wait()

        stream = respond._Stream(job, chunks(job), 0.5, notes, False)
        sending = asyncio.create_task(stream({}, stuck.wait, send))  # type: ignore[arg-type]
        for held in (True, False):  # until past the limit; within the last seconds it is free
            while bool(model.held) is not held and not sending.done():
                await asyncio.sleep(0.01)
        assert not sending.done()
        await sending
        assert not model.held
        assert notes["cancelled"] and "not done within" in str(notes["error"])

    serving(Engine(model), program)


@pytest.mark.parametrize(("raised", "status"), ((None, 408), (ValueError("x"), 400), (EngineFailed("x"), 500)))
def test_what_ends_a_wait_has_its_status(raised: Exception | None, status: int) -> None:
    async def work() -> None:
        await asyncio.sleep(5 if raised is None else 0)
        raise raised

    with pytest.raises(ApiError) as caught:
        asyncio.run(_in_time(work(), 0.02))
    assert caught.value.status == status


# ------------------------------------------------------------------------------------------------ checks of a draft


def drafts_of(worker: Worker, drafter: Drafter | None, on_swap: Callable[[], None] = lambda: None) -> Drafts:
    """What swaps to ``drafter``, whatever name is asked for."""
    target = worker.engine.target
    return Drafts(worker, Loaded(None, None, "2"), lambda name: drafter, partial(greedy_check, target), on_swap)


def test_requests_run_on_while_a_draft_is_checked() -> None:
    """Between any two steps of the check there is one of the engine: they take turns."""
    model = TableModel(random_logits(8, 1), 8)
    engine = Engine(model)

    async def program(worker: Worker) -> None:
        job = worker.submit([Request([1], max_tokens=2000)], stream=True)
        await anext(job.batches())
        spoken = lambda engine: len(next(iter(engine._tasks.values())).samples[0].context.output_ids)  # noqa: E731
        before = await asyncio.wrap_future(worker.call(spoken))
        after: list[int] = []
        await drafts_of(worker, NgramDrafter(), lambda: after.append(spoken(engine))).swap("ngram", None)
        assert after[0] - before > 20 and engine.drafter is not None
        job.cancel()

    serving(engine, program)
    assert not model.held


def test_a_draft_takes_over_though_the_cache_is_full() -> None:
    """One slot, with requests queueing for it: the check takes its turn when one ends."""
    model = TableModel(random_logits(8, 1), 8, slots=1)

    async def program(worker: Worker) -> None:
        jobs = [worker.submit([Request([1], max_tokens=60)], stream=False) for _ in range(6)]
        drafts = drafts_of(worker, NgramDrafter())
        await drafts.swap("ngram", None)
        assert drafts.current.name == "ngram" and drafts.version == 1
        for job in jobs:
            assert len((await job.wait())[0].completions[0].token_ids) == 60

    serving(Engine(model, shares_target=True), program, max_waiting=20)
    assert not model.held


class Failing(NgramDrafter):
    """Fails when it is asked for drafts of more than made-up texts."""

    def open(self, context) -> bool:
        if context.capacity > 22:
            raise RuntimeError("no kernel image is available")
        return super().open(context)


def test_a_draft_that_fails_in_its_checks_is_refused_and_the_engine_lives() -> None:
    model = TableModel(random_logits(16, 1), 16)

    async def program(worker: Worker) -> None:
        drafts = drafts_of(worker, Failing())
        with pytest.raises(ApiError, match="RuntimeError: no kernel image") as refused:
            await drafts.swap("other", None)
        assert refused.value.status == 409 and drafts.version == 0 and worker.alive and worker.engine.drafter is None
        with pytest.raises(ApiError, match="no draft to go back to"):
            await drafts.rollback()
        worker.stop()
        with pytest.raises(ApiError) as refused:
            await drafts_of(worker, None).swap(None, None)
        assert refused.value.status == 503

    serving(Engine(model), program)
    assert not model.held


class Broken(NgramDrafter):
    """Drafts what is no token."""

    def propose(self, contexts, lengths):
        drafts = super().propose(contexts, lengths)
        drafts.ids[:] = 1000
        return drafts


class NotALaw(ModelDrafter):
    """Says it drew from a law that is none."""

    def propose(self, contexts, lengths):
        drafts = super().propose(contexts, lengths)
        drafts.probs[:] = 0.5
        return drafts


def test_drafts_are_checked_before_they_serve() -> None:
    model = TableModel(random_logits(16, 1), 16)
    draft = TableModel(random_logits(16, 2), 16)
    fit: list[Drafter | None] = [None, NgramDrafter(), ModelDrafter(draft, model)]
    for drafter in fit:
        if drafter is not None:
            check_drafter(drafter, 16)
        check_greedy(model, drafter)
    for drafter, message in ((Broken(), "outside the target's vocabulary"), (NotALaw(draft, model), "none")):
        with pytest.raises(SelfTestFailed, match=message):
            check_drafter(drafter, 16)
    assert not model.held and not draft.held


def test_a_target_that_reads_batches_wrongly_fails_the_greedy_check() -> None:
    """Its logits depend on how many rows are asked for at once: plain and speculative texts part."""
    honest = random_logits(16, 1)
    model = TableModel(honest, 16)
    forward = model.forward

    def wrong(step):
        logits = forward(step)
        return logits.roll(1, -1) if len(step.logit_rows) > 1 else logits

    model.forward = wrong  # type: ignore[method-assign]
    with pytest.raises(SelfTestFailed, match="where plain decoding gives"):
        check_greedy(model, NgramDrafter())
