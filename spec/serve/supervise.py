"""A server that is another program: started, watched until it is ready, told to stop, and never left behind.

vLLM's server ends with status 0 when its engine core has died. Whoever runs ours must hear of that, so it is not become
but supervised: an end that nobody asked for is a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INTERRUPTED = 130
_POLL_S = 0.25
_GRACE_S = 30.0  # beyond the drain, for the program to put itself away


@dataclass(frozen=True)
class Outcome:
    """How it ended. ``status``: 0 only if it was asked to stop, 130 if by SIGINT; ``ready``: whether it ever served."""

    status: int
    ready: bool


def supervise(
    argv: Sequence[str], environment: Mapping[str, str], url: str, on_ready: Callable[[], None], drain_s: float
) -> Outcome:
    """Runs a program until it ends; SIGTERM and SIGINT go on to it. From the main thread.

    It has a process group of its own, which is killed at the end: engine processes may outlive their server. ``url``
    answers 200 once it is ready. Past ``drain_s`` and a grace after a signal it is killed.
    """
    child = spawn(argv, environment)
    asked: list[int] = []
    give_up, ready = float("inf"), False
    with _forwarded(child, asked):
        try:
            while child.poll() is None:
                if not ready and not asked and answers(url):
                    ready = True
                    on_ready()
                if asked and give_up == float("inf"):
                    give_up = time.monotonic() + drain_s + _GRACE_S
                if time.monotonic() > give_up:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_S)
        finally:
            end_group(child)
    if asked:
        return Outcome(INTERRUPTED if asked[0] == signal.SIGINT else 0, ready)
    return Outcome(
        child.returncode if child.returncode > 0 else 128 - child.returncode if child.returncode else 1, ready
    )


def spawn(argv: Sequence[str], environment: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a program in a session of its own, which on Linux gets SIGTERM if this process dies.

    ``options``: further ones of ``Popen``. From a thread that lives as long as the process.
    """
    return subprocess.Popen(
        list(argv), env=dict(environment), start_new_session=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None, **options,
    )  # fmt: skip


def end_group(child: subprocess.Popen[bytes]) -> None:
    """Kills what is left of the program and of what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def answers(url: str) -> bool:
    """Whether a GET is answered with status 200."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def _forwarded(child: subprocess.Popen[bytes], asked: list[int]) -> Iterator[None]:
    """SIGTERM and SIGINT go to ``child`` and are noted in ``asked``."""

    def forward(number: int, _: object) -> None:
        asked.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
