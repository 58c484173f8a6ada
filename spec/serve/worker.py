"""The thread that owns the engine, and what an HTTP handler holds of it.

Requests, cancellations and swaps go in through a queue and are taken between steps; tokens come out in batches, one
wake-up of the event loop a step. Nothing else touches the engine.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from spec.request import Event, Request, Result

if TYPE_CHECKING:
    from spec.engine import Engine

Watcher = Callable[[Result], None]
Item = tuple[int, Event | Result]  # index of the request in its job, and what came of it
T = TypeVar("T")


class Busy(Exception):
    """The queue is full; ``retry_after`` seconds from now there may be room."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class EngineFailed(Exception):
    """The engine's thread has ended, and with it every request it had."""


class Job:
    """Engine requests that one HTTP call waits for, in the event loop that submitted them."""

    def __init__(self, worker: Worker, requests: Sequence[Request], stream: bool, clients_seed: bool):
        self.requests, self.stream, self.clients_seed = requests, stream, clients_seed
        self.samples = sum(request.n for request in requests)
        self.results: list[Result | None] = [None] * len(requests)
        self.loop = asyncio.get_running_loop()
        self.ids: list[int] = []  # in the engine; only its thread reads and writes them
        self.spoke: dict[tuple[int, int], float] = {}  # (request, sample) -> the step that gave it tokens last
        self.watchers: list[Watcher] = []  # of each request: who else is told of its result
        self._worker = worker
        self._items: asyncio.Queue[Sequence[Item] | Exception] = asyncio.Queue()

    @property
    def ended(self) -> bool:
        return all(result is not None for result in self.results)

    async def batches(self) -> AsyncIterator[Sequence[Item]]:
        """What each step gave: tokens (of streaming jobs), and one :class:`Result` a request, until all are there.

        Raises EngineFailed, or ValueError for a request that the engine refused.
        """
        while not self.ended:
            batch = await self._items.get()
            if isinstance(batch, Exception):
                raise batch
            for index, item in batch:
                if isinstance(item, Result):
                    self.results[index] = item
            yield batch

    async def wait(self) -> list[Result]:
        """All results, in order. Raises as :meth:`batches`."""
        async for _ in self.batches():
            pass
        return [result for result in self.results if result is not None]

    def cancel(self) -> None:
        """Frees what the job holds in the engine, before its next step. Nothing happens if the job has ended."""
        self._worker.cancel(self)

    def put(self, batch: Sequence[Item] | Exception) -> None:
        """In the job's event loop."""
        self._items.put_nowait(batch)


class Worker:
    """Drives the engine in a thread of its own.

    Args:
        max_waiting: samples that may wait behind those that run; more are refused with :class:`Busy`.
        on_result: told of every result, in the engine's thread.
        on_gap: told of the seconds between two steps that gave a streamed sample tokens, in the engine's thread.
        on_failure: told, in the engine's thread, that the engine failed; every job has been told before.

    ``on_arrival`` may be set before the start: shown every request in the order in which the engine gets them, with
    whether its seed is a client's, in the engine's thread; what it returns is called with the result.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_running: int,
        max_waiting: int,
        on_result: Callable[[Result], None] = lambda result: None,
        on_gap: Callable[[float], None] = lambda seconds: None,
        on_failure: Callable[[BaseException], None] = lambda error: None,
    ):
        self.engine = engine
        self.failure: BaseException | None = None
        self._most = max_running + max_waiting
        self._max_running = max_running
        self._on_result, self._on_gap, self.on_failure = on_result, on_gap, on_failure
        self.on_arrival: Callable[[Request, bool], Watcher] = lambda request, clients_seed: lambda result: None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()  # in the engine; only its thread changes it
        self._outbox: dict[Job, list[Item]] = {}
        self._samples, self._lock = 0, threading.Lock()  # submitted and not ended
        self._now = 0.0  # at the beginning of this step
        self._seconds = 1.0  # that a request takes, a running mean for Retry-After
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and self.failure is None and not self._stopping

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Cancels what still runs and ends the thread."""
        self._commands.put(self._stop)
        self._thread.join(timeout_s)

    def submit(self, requests: Sequence[Request], stream: bool, clients_seed: bool = False) -> Job:
        """Queues checked requests; from an event loop. Raises Busy or EngineFailed."""
        job = Job(self, requests, stream, clients_seed)
        with self._lock:
            if not self.alive:
                raise EngineFailed("the engine is not running")
            if self._samples + job.samples > self._most:
                waiting = self._samples + job.samples - self._max_running
                raise Busy(max(1, min(60, round(self._seconds * waiting / self._max_running))))
            self._samples += job.samples
            self._commands.put(partial(self._add, job))  # in here, or _tell_all might miss it
        return job

    def cancel(self, job: Job) -> None:
        """See :meth:`Job.cancel`. From any thread."""
        if not job.ended:
            self._commands.put(partial(self._cancel, job))

    def cancel_all(self) -> None:
        """Ends what runs and waits; whoever waits for it is told. From any thread."""
        self._commands.put(self._cancel_all)

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Runs ``function(engine)`` between steps, in the engine's thread; its outcome, EngineFailed without an engine.

        Cancelling the future before its turn leaves the call out.
        """
        future: Future[T] = Future()
        with self._lock:
            if self.alive:
                self._commands.put(partial(self._call, future, function))  # in here, or _tell_all might miss it
            else:
                future.set_exception(EngineFailed("the engine is not running"))
        return future

    # Below: in the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                self._now = time.perf_counter()
                if self.engine.busy:
                    self.engine.step()
                self._deliver()
        except BaseException as error:  # the thread's boundary: whoever waits must hear of it
            self._fail(error)
        else:
            self._tell_all(EngineFailed("the server is shutting down"))

    def _take_commands(self) -> None:
        """All that wait, and the next one to come if there is nothing to do."""
        if not self.engine.busy:
            self._commands.get()()
        for _ in range(self._commands.qsize()):  # not what they queue: a step comes in between
            self._commands.get()()

    def _add(self, job: Job) -> None:
        self._jobs.add(job)
        try:
            for index, request in enumerate(job.requests):
                on_token = partial(self._token, job, index) if job.stream else None
                job.ids.append(self.engine.add(request, on_token, partial(self._done, job, index)))
                job.watchers.append(self.on_arrival(request, job.clients_seed))
        except ValueError as error:
            self._cancel(job)
            self._leave(job)
            job.loop.call_soon_threadsafe(job.put, error)

    def _call(self, future: Future[T], function: Callable[[Engine], T]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            outcome = function(self.engine)
        except Exception as error:  # the caller's to handle
            future.set_exception(error)
        else:
            future.set_result(outcome)

    def _cancel(self, job: Job) -> None:
        for id in job.ids:
            self.engine.cancel(id)

    def _cancel_all(self) -> None:
        for job in self._jobs:
            self._cancel(job)

    def _token(self, job: Job, index: int, event: Event) -> None:
        self._outbox.setdefault(job, []).append((index, event))
        spoke, key = job.spoke, (index, event.sample)
        if event.token_id is not None and spoke.get(key) != self._now:
            if key in spoke:
                self._on_gap(self._now - spoke[key])
            spoke[key] = self._now

    def _done(self, job: Job, index: int, result: Result) -> None:
        self._outbox.setdefault(job, []).append((index, result))
        self._on_result(result)
        job.watchers[index](result)
        self._seconds += 0.1 * (result.seconds - self._seconds)
        job.ids[index] = -1  # no number of a request
        if all(id == -1 for id in job.ids):
            self._leave(job)

    def _leave(self, job: Job) -> None:
        if job in self._jobs:
            self._jobs.remove(job)
            with self._lock:
                self._samples -= job.samples

    def _deliver(self) -> None:
        """What the step gave, with one wake-up of each event loop."""
        if not self._outbox:
            return
        outbox, self._outbox = self._outbox, {}
        for loop in {job.loop for job in outbox}:
            mine = [(job, items) for job, items in outbox.items() if job.loop is loop]
            loop.call_soon_threadsafe(_put_all, mine)

    def _stop(self) -> None:
        with self._lock:  # submit() is not half way through: what it queued is told, what comes later is refused
            self._stopping = True

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self.failure = error
        self._tell_all(EngineFailed(f"the engine failed ({type(error).__name__}): the request is lost"))
        self.on_failure(error)

    def _tell_all(self, error: EngineFailed) -> None:
        for job in self._jobs:
            job.loop.call_soon_threadsafe(job.put, error)
        self._jobs.clear()
        while not self._commands.empty():  # what was submitted meanwhile fails too, when its handler waits
            command = self._commands.get()
            if not isinstance(command, partial):
                continue
            if command.func == self._add:
                job = command.args[0]
                job.loop.call_soon_threadsafe(job.put, error)
            elif command.func == self._call and command.args[0].set_running_or_notify_cancel():
                command.args[0].set_exception(error)


def _put_all(batches: Sequence[tuple[Job, list[Item]]]) -> None:
    for job, items in batches:
        job.put(items)
