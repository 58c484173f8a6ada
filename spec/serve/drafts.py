"""The draft in use, the one before it, and the exchange of one for another while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spec.loading import draft_length
from spec.serve.errors import ApiError
from spec.serve.selftest import check_drafter
from spec.serve.slices import Check, SelfTestFailed, advance
from spec.serve.worker import EngineFailed

if TYPE_CHECKING:
    from spec.drafters.base import Drafter
    from spec.engine import Engine
    from spec.serve.worker import Worker

_CHECK_SECONDS = 300.0  # for the checks of a candidate, most of them waiting for room in a full cache


@dataclass(frozen=True)
class Loaded:
    """A draft by name, ready to draft; no drafter: plain decoding."""

    name: str | None
    drafter: Drafter | None
    length: str  # as on the command line: K or auto


class Drafts:
    """Swaps drafts between steps of the engine; the target's law holds before, during and after (Engine.swap_drafter).

    Args:
        load: makes the drafter a name stands for, or raises ValueError or OSError with the remedy.
        check: what a candidate has to pass, in parts that run between steps of the engine.
        on_swap: told after every exchange, in the engine's thread.
    """

    def __init__(
        self,
        worker: Worker,
        current: Loaded,
        load: Callable[[str | None], Drafter | None],
        check: Callable[[Drafter | None], Check[Any]],
        on_swap: Callable[[], None] = lambda: None,
    ):
        self.current = current
        self.previous: Loaded | None = None
        self.version = 0
        self._worker, self._load, self._check, self._on_swap = worker, load, check, on_swap
        self._exchange = asyncio.Lock()
        self._default_length = current.length

    async def swap(self, name: str | None, length: str | None) -> None:
        """Loads a draft beside the current one, checks it, and lets it take over.

        Raises ApiError: 400 for a draft that cannot be loaded or fits another tokenizer or vocabulary, 409 where it
        fails its checks or another swap is under way, 503 without an engine. The current draft stays then.
        """
        length = length or self._default_length
        if self._exchange.locked():
            raise ApiError(409, "another draft is being loaded: wait for it", code="swap_in_progress")
        async with self._exchange:
            try:
                draft_length(length)
                drafter = await asyncio.to_thread(self._loaded, name)
                await self._checked(drafter)
                await self._take_over(Loaded(name, drafter, length))
            except SelfTestFailed as error:
                raise ApiError(409, f"the draft failed its smoke check: {error}", code="smoke_check_failed") from None
            except (ValueError, OSError) as error:
                raise ApiError(400, " ".join(str(error).split()), param="draft") from None
            except EngineFailed as error:
                raise ApiError(503, str(error)) from None

    async def rollback(self) -> None:
        """The draft before the current one takes over again. Raises ApiError 409 where there is none, 503 as above."""
        if self._exchange.locked() or self.previous is None:
            raise ApiError(409, "there is no draft to go back to, or one is being loaded")
        async with self._exchange:
            try:
                await self._take_over(self.previous)
            except EngineFailed as error:
                raise ApiError(503, str(error)) from None

    def _loaded(self, name: str | None) -> Drafter | None:
        try:
            drafter = self._load(name)
            if drafter is not None:
                check_drafter(drafter, self._worker.engine.target.vocab_size)
        except (ValueError, OSError, SelfTestFailed):
            raise
        except Exception as error:  # no memory for it, a kernel that is missing: the candidate's fault all the same
            raise SelfTestFailed(f"{type(error).__name__}: {error}") from error
        return drafter

    async def _checked(self, drafter: Drafter | None) -> None:
        """Raises SelfTestFailed. There is a part of the check between any two steps of the engine: requests run on."""
        check = self._check(drafter)
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                while not await asyncio.wrap_future(self._worker.call(lambda engine: advance(engine, check))):
                    pass
        except TimeoutError:
            raise SelfTestFailed(f"not done within {_CHECK_SECONDS:.0f} s: try again when fewer requests run") from None
        finally:
            self._worker.call(lambda engine: check.close())

    async def _take_over(self, new: Loaded) -> None:
        def exchange(engine: Engine) -> None:
            engine.swap_drafter(new.drafter, draft_length(new.length))
            self.current, self.previous = new, self.current  # here: true from this step on, whoever waits for it
            self.version += 1
            self._on_swap()

        await asyncio.wrap_future(self._worker.call(exchange))
