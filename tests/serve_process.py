"""A real ``python -m spec.serve`` in a process of its own, on tiny models, for the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[1]


class ServerProcess:
    """Starts a server on a free port and waits until it is ready; its log lines are in ``lines``.

    ``program``: what Python runs instead of ``-m spec.serve``.
    """

    def __init__(
        self, *arguments: object, env: dict[str, str] | None = None, wait_s: float = 120,
        program: Sequence[str] = ("-m", "spec.serve"),
    ):  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, *program, "--port", "0", *map(str, arguments)],
            cwd=ROOT, env={**os.environ, **(env or {})}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.raw: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready = self.event("ready", wait_s)
        self.url = self.ready["url"]

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in list(self.raw) if line.startswith("{")]

    def event(self, name: str, wait_s: float = 10, **fields: Any) -> dict[str, Any]:
        """The first log line of this event with these fields."""
        end = time.monotonic() + wait_s
        while time.monotonic() < end:
            for line in self.lines:
                if line["event"] == name and all(line.get(key) == value for key, value in fields.items()):
                    return line
            if self.process.poll() is not None:
                self._reader.join(1)
                break
            time.sleep(0.02)
        raise AssertionError(f"no {name} {fields} in:\n" + "\n".join(self.raw[-30:]))

    def figure(self, name: str) -> float:
        """The sum of a metric's series."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def settled(self, name: str, value: float, wait_s: float = 10) -> None:
        """Waits until a metric has this value."""
        end = time.monotonic() + wait_s
        while self.figure(name) != value:
            assert time.monotonic() < end, f"{name} is {self.figure(name)}, not {value}"
            time.sleep(0.02)

    def at_rest(self, name: str, wait_s: float = 20) -> float:
        """The value of a metric once it has stood still for half a second: what came before is through."""
        end, value, since = time.monotonic() + wait_s, self.figure(name), time.monotonic()
        while time.monotonic() < since + 0.5:
            assert time.monotonic() < end, f"{name} keeps changing: {value}"
            time.sleep(0.05)
            if (now := self.figure(name)) != value:
                value, since = now, time.monotonic()
        return value

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        status = self.process.wait(60)
        self._reader.join(5)
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.raw.append(line.rstrip("\n"))
