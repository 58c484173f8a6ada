"""Work on the target that is done a step at a time, so that whoever else it serves does not wait for it.

A *check* is a generator that does one step's work between two yields and raises :class:`SelfTestFailed`. It yields
whether it got on: False while the target's cache had no room for it. At a start it is run through; beside a server
every part of it is one call between two steps of the serving engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from spec.request import Completion

if TYPE_CHECKING:
    from spec.engine import Engine
    from spec.models.base import LanguageModel
    from spec.request import Request, Result

T = TypeVar("T")
Check = Generator[bool, None, T]
_NO_ROOM = "the cache has no room for the checks: raise --cache-tokens"


class SelfTestFailed(Exception):
    """The drafter, or the engine with it, does not do what it must; the message says what."""


def run(check: Check[T]) -> T:
    """From beginning to end, where nobody else uses the target. Raises SelfTestFailed."""
    with contextlib.closing(check):
        while True:
            try:
                if not next(check):
                    raise SelfTestFailed(_NO_ROOM)
            except StopIteration as end:
                outcome: T = end.value
                return outcome


def advance(engine: Engine, check: Check[Any]) -> bool:
    """One part, between steps of ``engine``; whether that was the last one. Raises SelfTestFailed, whatever failed."""
    try:
        if not next(check) and not engine.busy:
            raise SelfTestFailed(_NO_ROOM)  # nobody will make any
        return False
    except StopIteration:
        return True
    except SelfTestFailed:
        raise
    except Exception as error:  # the candidate's fault, not the server's
        raise SelfTestFailed(f"{type(error).__name__}: {error}") from error


def completions(engine: Engine, requests: Sequence[Request]) -> Check[list[Completion]]:
    """What an engine of the check's own, on a target it shares, makes of requests with one sample each.

    Raises SelfTestFailed where one ends with an error.
    """
    while not _room(engine.target, requests):
        yield False
    results: dict[int, Result] = {}
    ids = [engine.add(r, on_done=partial(results.__setitem__, i)) for i, r in enumerate(requests)]
    try:
        while engine.step():
            yield True
    finally:
        for id in ids:  # left half way: its slots are free at once
            engine.cancel(id)
    found = [results[i].completions[0] for i in range(len(requests))]
    for completion in found:
        if completion.error is not None:
            raise SelfTestFailed(completion.error)
    return found


def _room(target: LanguageModel, requests: Sequence[Request]) -> bool:
    """Whether all could be opened now."""
    slots: list[int] = []
    try:
        for request in requests:
            slot = target.open(min(len(request.prompt_ids) + request.max_tokens, target.max_positions))
            if slot is None:
                return False
            slots.append(slot)
        return True
    finally:
        for slot in slots:
            target.close(slot)
