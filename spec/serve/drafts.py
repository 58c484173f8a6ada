"""The draft in use, the one before it, and the exchange of one for another while requests run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spec.loading import draft_length
from spec.serve.errors import ApiError
from spec.serve.selftest import SelfTestFailed, check_drafter, check_greedy

if TYPE_CHECKING:
    from spec.drafters.base import Drafter
    from spec.engine import Engine
    from spec.serve.worker import Worker


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
        on_swap: told after every exchange.
    """

    def __init__(
        self,
        worker: Worker,
        current: Loaded,
        load: Callable[[str | None], Drafter | None],
        on_swap: Callable[[], None] = lambda: None,
    ):
        self.current = current
        self.previous: Loaded | None = None
        self.version = 0
        self._worker, self._load, self._on_swap = worker, load, on_swap
        self._exchange = asyncio.Lock()
        self._default_length = current.length

    async def swap(self, name: str | None, length: str | None) -> Loaded:
        """Loads a draft beside the current one, checks it, and lets it take over.

        Raises ApiError: 400 for a draft that cannot be loaded or fits another tokenizer or vocabulary, 409 where it
        fails its smoke check or another swap is under way. The current draft stays then.
        """
        length = length or self._default_length
        if self._exchange.locked():
            raise ApiError(409, "another draft is being loaded: wait for it", code="swap_in_progress")
        async with self._exchange:
            try:
                draft_length(length)
                drafter = await asyncio.to_thread(self._checked, name)
                return await self._take_over(Loaded(name, drafter, length), test=True)
            except SelfTestFailed as error:
                raise ApiError(409, f"the draft failed its smoke check: {error}", code="smoke_check_failed") from None
            except (ValueError, OSError) as error:
                raise ApiError(400, " ".join(str(error).split()), param="draft") from None

    async def rollback(self) -> Loaded:
        """The draft before the current one takes over again. Raises ApiError 409 where there is none."""
        if self._exchange.locked() or self.previous is None:
            raise ApiError(409, "there is no draft to go back to, or one is being loaded")
        async with self._exchange:
            return await self._take_over(self.previous, test=False)

    def _checked(self, name: str | None) -> Drafter | None:
        drafter = self._load(name)
        if drafter is not None:
            check_drafter(drafter, self._worker.engine.target.vocab_size)
        return drafter

    async def _take_over(self, new: Loaded, test: bool) -> Loaded:
        def exchange(engine: Engine) -> None:
            if test:
                check_greedy(engine.target, new.drafter)
            engine.swap_drafter(new.drafter, draft_length(new.length))

        await asyncio.wrap_future(self._worker.call(exchange))
        self.current, self.previous = new, self.current
        self.version += 1
        self._on_swap()
        return new
