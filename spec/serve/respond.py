"""From queued engine requests to the answer on the wire, whole or streamed, until the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import JSONResponse, Response

from spec.request import Event, Request, Result
from spec.serve.answers import Answer, Head, Json, facts, usage
from spec.serve.errors import ApiError
from spec.serve.worker import Busy, EngineFailed, Item, Job, Worker

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.types import Receive, Scope, Send

    from spec.serve.protocol import Sampling

T = TypeVar("T")
_LAST_SECONDS = 5.0  # for a client to take the end of its stream


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def submit(worker: Worker, requests: Sequence[Request], body: Sampling) -> Job:
    """Queues them. Raises ApiError 429 with Retry-After where there is no room, 503 where there is no engine."""
    try:
        return worker.submit(requests, bool(body.stream), clients_seed=body.seed is not None)
    except Busy as busy:
        raise ApiError(
            429, f"the queue is full; try again in {busy.retry_after} s", code="queue_full",
            headers={"Retry-After": str(busy.retry_after)},
        ) from None  # fmt: skip
    except EngineFailed as error:
        raise ApiError(503, str(error)) from None


async def respond(
    http: HttpRequest, job: Job, answer: Answer, head: Head, body: Sampling, limit_s: float, log_text: bool
) -> Response:
    """The answer to one call. Whatever ends it, the job holds nothing in the engine afterwards."""
    notes: Json = http.scope["facts"]
    notes |= {"prompt_tokens": sum(len(request.prompt_ids) for request in job.requests), "stream": job.stream}
    if job.stream:
        return _Stream(job, _chunks(job, answer, head, body), limit_s, notes, log_text)
    try:
        results = await _unless_gone(http.receive, _in_time(job.wait(), limit_s))
    except ClientGone:
        notes["cancelled"] = True
        return Response(status_code=499)
    finally:
        job.cancel()
    _check(results)
    _note(notes, results, log_text)
    choices = [
        await answer.choice(prompt * job.requests[0].n + i, prompt, completion)
        for prompt, result in enumerate(results)
        for i, completion in enumerate(result.completions)
    ]
    whole = {**head.around(answer.object, choices), "usage": usage(results)}
    return JSONResponse({**whole, "metrics": facts(results)} if body.metrics else whole)


class _Stream(Response):
    """Server-sent events: chunks, perhaps an error, and ``[DONE]`` as the last, always."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, chunks: AsyncIterator[Json], limit_s: float, notes: Json, log_text: bool):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._chunks, self._limit_s = job, chunks, limit_s
        self._notes, self._log_text = notes, log_text

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await _unless_gone(receive, self._send_all(send))
        except ClientGone:
            self._notes["cancelled"] = True
        finally:
            self._job.cancel()

    async def _send_all(self, send: Send) -> None:
        async def line(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        async def all_chunks() -> None:
            async for chunk in self._chunks:
                await line(json.dumps(chunk, ensure_ascii=False))

        async def end(*last: str) -> None:
            for data in (*last, "[DONE]"):
                await line(data)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _in_time(all_chunks(), self._limit_s)
        except ApiError as error:
            self._job.cancel()  # first: a client that reads nothing may hold up what is written now
            self._notes["error"] = error.message
            await _written(end(json.dumps(error.body())))
        else:
            _note(self._notes, [r for r in self._job.results if r is not None], self._log_text)
            await _written(end())


async def _written(last: Coroutine[Any, Any, None]) -> None:
    """Raises ClientGone where the client does not take it."""
    try:
        async with asyncio.timeout(_LAST_SECONDS):
            await last
    except TimeoutError:
        raise ClientGone from None


async def _chunks(job: Job, answer: Answer, head: Head, body: Sampling) -> AsyncIterator[Json]:
    """One a step and sample, however many tokens it gave; one a token where ``metrics`` tells of each."""
    counted = body.stream_options is not None and bool(body.stream_options.include_usage)
    blank: Json = {"usage": None} if counted else {}
    live: dict[int, Counter[str]] = defaultdict(Counter)
    async for batch in job.batches():
        for prompt, sample, events in _spoken(batch):
            index = prompt * job.requests[0].n + sample
            for part in [[event] for event in events] if body.metrics else [events]:
                choice = await answer.delta(index, prompt, part)
                origin: Json = {}
                if body.metrics:
                    (event,) = part
                    live[index].update(tokens=1, accepted=event.from_draft, drafted=event.drafted or 0)
                    live[index].update(target_steps=event.drafted is not None)
                    origin = {"from_draft": event.from_draft, "so_far": dict(live[index])}
                if choice is not None:
                    yield {**head.around(answer.chunk_object, [choice | origin]), **blank}
        _check([item for _, item in batch if isinstance(item, Result)])
    results = [result for result in job.results if result is not None]
    last: Json = {"usage": usage(results)} if counted else {}
    if body.metrics:
        last["metrics"] = facts(results)
    if last:
        yield {**head.around(answer.chunk_object, []), **last}


def _spoken(batch: Sequence[Item]) -> list[tuple[int, int, list[Event]]]:
    """(prompt, sample, its tokens of the step); of what ends by an error or cancellation the Result says more."""
    found: dict[tuple[int, int], list[Event]] = {}
    for prompt, item in batch:
        if isinstance(item, Event) and item.finish_reason not in ("error", "cancelled"):
            found.setdefault((prompt, item.sample), []).append(item)
    return [(*whose, events) for whose, events in found.items()]


async def _in_time(work: Coroutine[Any, Any, T], limit_s: float) -> T:
    """Raises ApiError 408 past the limit, 400 for what the engine refused, 500 where it failed."""
    try:
        async with asyncio.timeout(limit_s):
            return await work
    except TimeoutError:
        raise ApiError(
            408, f"not done within {limit_s:g} s: ask for fewer tokens, or raise --request-timeout"
        ) from None
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    except EngineFailed as error:
        raise ApiError(500, str(error)) from None


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The outcome of ``work``, cancelled with ClientGone as soon as the client has gone."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def _check(results: Sequence[Result]) -> None:
    """Raises ApiError for a sample that did not end by itself."""
    for result in results:
        for completion in result.completions:
            if completion.finish_reason == "error":
                raise ApiError(500, completion.error or "the engine failed")
            if completion.finish_reason == "cancelled":
                raise ApiError(503, "the request was cancelled by the server")


def _note(notes: Json, results: Sequence[Result], with_text: bool) -> None:
    """What the log says of a finished call."""
    completions = [completion for result in results for completion in result.completions]
    notes |= {
        "completion_tokens": sum(len(c.token_ids) for c in completions),
        "drafted": sum(sum(c.drafted) for c in completions),
        "accepted": sum(sum(c.accepted) for c in completions),
        "target_steps": sum(c.target_steps for c in completions),
        "finish": [c.finish_reason for c in completions],
    }
    if with_text:
        notes |= {"text": [c.text for c in completions], "prompt_ids": [list(r.request.prompt_ids) for r in results]}
