"""Clients that do all that clients do to a server, for as long as asked, and what came of it.

Whole answers and streams of both endpoints, log-probs, tokenizing, malformed fields, bodies that are none, connections
broken off at every stage, and an operator who keeps exchanging the draft.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

QUESTION = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he?"}]
TWO = ["One", "Two"]
PATIENCE_S = 700  # beyond the server's own limit for a request: what hangs there is answered 408
LEFT = 0  # in the place of a status: the client went away
WRONG_FIELDS: tuple[dict[str, Any], ...] = (
    {"max_tokens": -1}, {"messages": "x"}, {"messages": []}, {"top_p": "y"}, {"temperature": -1}, {"stop": [""]},
    {"n": 1000}, {"max_tokens": 10**6}, {"logit_bias": {"a": 1}}, {"no_such_field": 1}, {"tools": [{}]},
    {"model": "other"},
)  # fmt: skip
NO_BODIES = (
    b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe{}", b'{"messages": NaN}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"[" * 5000, b'{"a":' * 5000, b" " * 5_000_000,
)  # fmt: skip
NO_HTTP = (
    b"GARBAGE\r\n\r\n", b"GET /health HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{\"messages\": ",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
)  # fmt: skip


class Soak:
    """``run()`` it; then ``statuses``, ``faults`` and ``memory_mib`` tell.

    Args:
        pid: the server's process, for its memory.
        drafts: what the operator exchanges for one another, in turn, in the first third: what a draft that is no longer
            wanted leaves to the allocator must not pass for a leak of the requests in the last.
    """

    def __init__(self, url: str, pid: int, seconds: float, *, admin_key: str, drafts: tuple[str | None, ...]):
        self.url, self.seconds = url, seconds
        self.statuses: Counter[tuple[str, int]] = Counter()  # (kind of request, status): how many
        self.faults: list[str] = []
        self.slowest_s = 0.0  # of all requests
        self.memory_mib: list[tuple[float, float]] = []  # (seconds since the start, resident), once a second
        self._pid, self._drafts = pid, drafts
        self._admin = {"Authorization": f"Bearer {admin_key}"}
        self._lock = threading.Lock()
        self._began = 0.0
        self._kinds: tuple[Callable[[random.Random], int], ...] = (
            self.whole, self.whole, self.stream, self.stream, self.completion, self.completion_stream, self.tokenize,
            self.wrong_field, self.no_body, self.no_http, self.left_stream, self.left_whole,
        )  # fmt: skip

    def run(self, clients: int = 12) -> None:
        self._began = time.monotonic()
        with ThreadPoolExecutor(clients + 2) as pool:
            work = [pool.submit(self._client, seed) for seed in range(clients)]
            work += [pool.submit(self._operator), pool.submit(self._watch)]
            for one in work:
                one.result()

    def growth(self) -> float:
        """Largest over smallest resident memory in the last third."""
        late = [mib for at, mib in self.memory_mib if at > 2 / 3 * self.seconds]
        return max(late) / min(late)

    def by_status(self) -> dict[str, int]:
        found: Counter[int] = Counter()
        for (_, status), count in self.statuses.items():
            found[status] += count
        return {"left" if status == LEFT else str(status): found[status] for status in sorted(found)}

    # Kinds of requests; each returns a status

    def whole(self, draw: random.Random) -> int:
        given = self._post("/v1/chat/completions", self._chat(draw))
        if given.status_code == 200 and any(c["finish_reason"] is None for c in given.json()["choices"]):
            self._fault("a choice without finish_reason: " + given.text)
        return given.status_code

    def stream(self, draw: random.Random) -> int:
        return self._read_stream("/v1/chat/completions", self._chat(draw))

    def completion(self, draw: random.Random) -> int:
        return self._post("/v1/completions", self._completion(draw)).status_code

    def completion_stream(self, draw: random.Random) -> int:
        return self._read_stream("/v1/completions", self._completion(draw))

    def tokenize(self, draw: random.Random) -> int:
        text = "".join(draw.choice("ab é漢\n🙂") for _ in range(draw.randint(0, 300)))
        given = self._post("/tokenize", {"prompt": text, "return_token_strs": draw.random() < 0.5})
        if given.status_code != 200:
            return given.status_code
        back = self._post("/detokenize", {"tokens": given.json()["tokens"]})
        if back.json().get("prompt") != text:
            self._fault(f"{text!r} does not survive its tokens")
        return given.status_code

    def wrong_field(self, draw: random.Random) -> int:
        return self._refused(self._post("/v1/chat/completions", {**self._chat(draw), **draw.choice(WRONG_FIELDS)}))

    def no_body(self, draw: random.Random) -> int:
        path = draw.choice(("/v1/chat/completions", "/v1/completions", "/tokenize", "/admin/draft"))
        kind = draw.choice(("application/json", "text/plain", "multipart/form-data"))
        headers, body = {"Content-Type": kind, **self._admin}, draw.choice(NO_BODIES)
        return self._refused(httpx.post(self.url + path, content=body, headers=headers, timeout=PATIENCE_S))

    def no_http(self, draw: random.Random) -> int:
        """Whatever is answered, the connection is closed half way through."""
        place = urlsplit(self.url)
        with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
            connection.sendall(draw.choice(NO_HTTP))
            connection.settimeout(0.2)
            try:
                line = connection.recv(100).split(b" ")
            except (TimeoutError, ConnectionResetError):
                return LEFT
        return int(line[1]) if len(line) > 1 else LEFT

    def left_stream(self, draw: random.Random) -> int:
        body = {**self._chat(draw), "stream": True, "max_tokens": 400}
        with httpx.stream("POST", self.url + "/v1/chat/completions", json=body, timeout=PATIENCE_S) as stream:
            for _ in zip(range(draw.randint(0, 8)), stream.iter_lines(), strict=False):
                pass
            return LEFT if stream.status_code == 200 else stream.status_code

    def left_whole(self, draw: random.Random) -> int:
        body = {**self._chat(draw), "max_tokens": 400, "ignore_eos": True}
        try:
            return self._post("/v1/chat/completions", body, timeout=draw.choice((0.05, 0.2, 0.5))).status_code
        except httpx.ReadTimeout:
            return LEFT

    # Below: how

    @staticmethod
    def _sampling(draw: random.Random) -> dict[str, Any]:
        body = {
            "max_tokens": draw.randint(1, 64), "temperature": draw.choice((0, 0.7, 1)), "n": draw.choice((1, 1, 2)),
            "top_p": draw.choice((1, 0.9)), "metrics": draw.random() < 0.5, "stop": draw.choice((None, "apples")),
            "draft_length": draw.choice((None, None, 0, 3)), "seed": draw.choice((None, draw.getrandbits(31))),
        }  # fmt: skip
        return {name: value for name, value in body.items() if value is not None}

    def _chat(self, draw: random.Random) -> dict[str, Any]:
        logprobs = {"logprobs": True, "top_logprobs": draw.randint(0, 5)} if draw.random() < 0.3 else {}
        return {"messages": QUESTION, **self._sampling(draw), **logprobs}

    def _completion(self, draw: random.Random) -> dict[str, Any]:
        extra = draw.choice(({}, {"echo": True}, {"logprobs": draw.randint(0, 5)}))
        return {"prompt": draw.choice(("Tom has", TWO, [5, 6, 7])), **self._sampling(draw), **extra}

    def _post(self, path: str, body: Any, timeout: float = PATIENCE_S) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=timeout)

    def _read_stream(self, path: str, body: dict[str, Any]) -> int:
        """To its end, which has to be proper: every choice finished, no error, [DONE]."""
        with httpx.stream("POST", self.url + path, json={**body, "stream": True}, timeout=PATIENCE_S) as stream:
            if stream.status_code != 200:
                return stream.status_code
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        chunks = [json.loads(line) for line in lines[:-1]]
        prompts = 2 if body.get("prompt") == TWO else 1
        ended = [c["index"] for chunk in chunks for c in chunk.get("choices", ()) if c["finish_reason"] is not None]
        if lines[-1] != "[DONE]" or any("error" in chunk for chunk in chunks):
            self._fault(f"a stream ended with {lines[-2:]}")
        elif sorted(ended) != list(range(prompts * body["n"])):
            self._fault(f"choices {ended} ended, of {prompts} times {body['n']}")
        return 200

    def _refused(self, given: httpx.Response) -> int:
        """An error, as OpenAI's clients read it; the queue may be full too."""
        try:
            explained = bool(given.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            explained = False
        if given.status_code < 400 or not explained:
            self._fault(f"{given.request.content[:200]!r} was answered {given.status_code} {given.text[:200]}")
        return given.status_code

    def _client(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self._began + self.seconds:
            kind = draw.choice(self._kinds)
            try:
                sent = time.monotonic()
                status = kind(draw)
                self._count(kind.__name__, status)
                self.slowest_s = max(self.slowest_s, time.monotonic() - sent)
                if status == 429:
                    time.sleep(0.5)
            except Exception as error:  # a client that dies would be a soak that passes
                self._fault(f"{kind.__name__}: {error!r}")

    def _operator(self) -> None:
        turn = 0
        while time.monotonic() < self._began + self.seconds / 3:
            time.sleep(min(20.0, self.seconds / 12))
            body = {"draft": self._drafts[turn % len(self._drafts)]}
            given = httpx.post(self.url + "/admin/draft", json=body, headers=self._admin, timeout=PATIENCE_S)
            self._count("swap", given.status_code)
            if given.status_code != 200:
                self._fault(f"swap to {body}: {given.text}")
            turn += 1

    def _watch(self) -> None:
        while (at := time.monotonic() - self._began) < self.seconds:
            self.memory_mib.append((round(at, 1), round(resident_mib(self._pid), 1)))
            time.sleep(min(1.0, self.seconds / 100))

    def _count(self, kind: str, status: int) -> None:
        with self._lock:
            self.statuses[kind, status] += 1

    def _fault(self, what: str) -> None:
        with self._lock:
            self.faults.append(f"{time.monotonic() - self._began:.0f} s: {what}")


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
