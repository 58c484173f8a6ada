"""The quickstart's student drafting for its teacher behind the server: same law, no error, no leak, a hard end.

``SERVE_SOAK_SECONDS`` sets the length of the soak (default 60; 1800 is the long one).
"""

from __future__ import annotations

import concurrent.futures
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve_process import ROOT, ServerProcess

TEACHER = Path(os.environ.get("ONPOLICY_CACHE") or Path.home() / ".cache/onpolicy") / "smollm2-135m-instruct-v1"
STUDENT = ROOT / "runs/quickstart/student"
SECONDS = float(os.environ.get("SERVE_SOAK_SECONDS", "60"))
QUESTION = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he?"}]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600 + 2 * SECONDS),
    pytest.mark.skipif(not TEACHER.is_dir() or not STUDENT.is_dir(), reason="needs `make quickstart`"),
]


@pytest.fixture(scope="module")
def server():
    server = ServerProcess(
        "--target", TEACHER, "--draft", STUDENT, "--backend", "torch", "--max-running", 8, "--max-waiting", 8,
        wait_s=300,
    )  # fmt: skip
    yield server
    if server.process.poll() is None:
        assert server.stop() == 0


def chat(server: ServerProcess, **body: Any) -> dict[str, Any]:
    given = httpx.post(
        server.url + "/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 48, **body}, timeout=120
    )
    assert given.status_code == 200, given.text
    return given.json()


def test_greedy_text_is_the_same_with_and_without_drafts(server) -> None:
    """And drafts are accepted: fewer target steps than tokens."""
    plain = chat(server, temperature=0, draft_length=0)
    quick = chat(server, temperature=0, draft_length=3, metrics=True)
    assert quick["choices"][0]["message"] == plain["choices"][0]["message"]
    facts = quick["metrics"]["choices"][0]
    assert facts["target_steps"] < 0.9 * facts["tokens"] and facts["accepted"] > 0


def one_request(server: ServerProcess, draw: random.Random) -> int:
    """Valid, malformed, or left alone half way; the status, 0 for one that was left."""
    kind = draw.choice(("whole", "stream", "malformed", "left", "left-whole"))
    body: dict[str, Any] = {
        "messages": QUESTION, "max_tokens": draw.randint(1, 64), "temperature": draw.choice((0, 0.7, 1)),
        "n": draw.choice((1, 1, 2)), "top_p": draw.choice((1, 0.9)), "stream": kind in ("stream", "left"),
    }  # fmt: skip
    if kind == "malformed":
        body |= draw.choice(({"max_tokens": -1}, {"messages": "x"}, {"top_p": "y"}, {"stop": [""]}, {"n": 1000}))
    try:
        if kind != "stream" and kind != "left":
            given = httpx.post(
                server.url + "/v1/chat/completions", json=body, timeout=0.2 if kind == "left-whole" else 120
            )
            return given.status_code
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=120) as stream:
            if stream.status_code != 200:
                return stream.status_code
            lines = [line for line, _ in zip(stream.iter_lines(), range(4 if kind == "left" else 10**6), strict=False)]
            assert kind == "left" or [line for line in lines if line][-1] == "data: [DONE]"
            return 200 if kind == "stream" else 0
    except httpx.ReadTimeout:
        assert kind == "left-whole"
        return 0


def resident_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_soak(server) -> None:
    """Mixed requests from twelve clients: no 5xx, streams end properly, memory flat over the last third."""
    end, memory = time.monotonic() + SECONDS, []

    def client(seed: int) -> list[int]:
        draw, statuses = random.Random(seed), []
        while time.monotonic() < end:
            statuses.append(one_request(server, draw))
            memory.append((time.monotonic(), resident_mib(server.process.pid)))
        return statuses

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        statuses = [status for part in pool.map(client, range(12)) for status in part]
    assert set(statuses) <= {0, 200, 400, 429} and statuses.count(200) > 0.2 * len(statuses)
    server.settled("vllm:num_requests_running", 0)
    server.settled("vllm:num_requests_waiting", 0)
    late = [mib for at, mib in memory if at > end - SECONDS / 3]
    half = len(late) // 2
    growth = max(late[half:]) / max(late[:half])
    print(f"{len(statuses)} requests, {statuses.count(429)} refused, {max(late):.0f} MiB, growth {growth:.4f}")
    assert growth < 1.02


def test_a_killed_server_ends_its_streams_with_an_error(server) -> None:
    """kill -9: the client sees a broken stream, never a finished one. The last of the file."""
    body = {"messages": QUESTION, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            for line in lines:
                assert "[DONE]" not in line
    assert server.process.wait(10) == -signal.SIGKILL
