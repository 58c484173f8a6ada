"""One JSON line a request, for machines to read; without any text of users unless that was asked for."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, TextIO


class RequestLog:
    """Writes lines to a stream, by default stderr. ``with_text``: prompts and answers too."""

    def __init__(self, with_text: bool = False, stream: TextIO | None = None):
        self.with_text = with_text
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()  # a text stream is not safe between threads

    def write(self, event: str, **fields: Any) -> None:
        """One line: the time, the event, and the fields that are not None."""
        given = {name: value for name, value in fields.items() if value is not None}
        line = {"time": round(time.time(), 3), "event": event, **given}
        # One write a line: several threads log, and print() writes the end of a line separately.
        text = json.dumps(line, ensure_ascii=False, default=str) + "\n"
        with self._lock:
            self._stream.write(text)
            self._stream.flush()

    def request(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """One answered request; handlers put what they know into ``scope["facts"]``."""
        self.write(
            "request", id=scope["request_id"], method=scope["method"], path=scope["path"], status=status,
            seconds=round(seconds, 4), **scope["facts"],
        )  # fmt: skip
