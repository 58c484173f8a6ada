"""A server process when things go wrong: time limits, the drain's end, an engine that fails, kill -9, odd hosts."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from spec.serve.log import RequestLog
from tests.conftest import make_model
from tests.serve_process import ServerProcess

PROMPT = "Tom has 3 apples and buys 4 more."
LONG: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}
COMMON = ("--backend", "torch", "--dtype", "float32", "--audit-at-start", 0)
ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture(scope="module")
def target(tmp_path_factory, tokenizer) -> Path:
    return make_model(tmp_path_factory.mktemp("operation") / "target", tokenizer)


@pytest.fixture(scope="module")
def slow(target):
    """Half a second for an answer, one second of drain, one sequence at a time, and its name is example.org."""
    server = ServerProcess(
        "--target", target, *COMMON, "--max-running", 1, "--max-waiting", 200, "--request-timeout", 0.5,
        "--drain-timeout", 1, "--log-text", "--allowed-host", "*.example.org", "--allowed-host", "127.0.0.1",
        "--default-max-tokens", 7, "--admin-key", "root",
    )  # fmt: skip
    yield server
    if server.process.poll() is None:
        server.stop()


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_an_answer_that_takes_too_long_ends_with_an_error(slow) -> None:
    many = {**LONG, "n": 100}
    given = httpx.post(slow.url + "/v1/completions", json=many)
    assert given.status_code == 408 and "raise --request-timeout" in given.json()["error"]["message"]
    with httpx.stream("POST", slow.url + "/v1/completions", json={**many, "stream": True}) as stream:
        *_, error, done = events(stream)
    assert json.loads(error)["error"]["type"] == "timeout_error" and done == "[DONE]"
    slow.settled("vllm:num_requests_waiting", 0)
    slow.settled("vllm:kv_cache_usage_perc", 0)


def test_options_reach_the_server(slow, tokenizer) -> None:
    chat = {"messages": [{"role": "user", "content": "a secret"}], "ignore_eos": True}
    given = httpx.post(slow.url + "/v1/chat/completions", json=chat)
    assert given.json()["usage"]["completion_tokens"] == 7
    line = slow.event("request", id=given.headers["x-request-id"])
    assert line["text"] == [given.json()["choices"][0]["message"]["content"]]
    assert "a secret" in tokenizer.decode(line["prompt_ids"][0])
    for name, status in (("a.example.org", 200), ("example.org", 400), ("localhost", 400), ("127.0.0.1", 200)):
        assert httpx.get(slow.url + "/v1/models", headers={"Host": name}).status_code == status, name


def test_swaps_that_cannot_be_are_conflicts(slow, target) -> None:
    url = slow.url + "/admin/draft"
    assert httpx.post(url + "/rollback", headers=ADMIN).status_code == 409
    answers: list[httpx.Response] = []

    def swap() -> None:
        answers.append(httpx.post(url, json={"draft": str(target)}, headers=ADMIN, timeout=60))

    threads = [threading.Thread(target=swap) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409]
    refused = next(answer for answer in answers if answer.status_code == 409)
    assert refused.json()["error"]["code"] == "swap_in_progress"
    assert httpx.get(url, headers=ADMIN).json()["version"] == 1


def test_a_killed_server_never_finishes_a_stream(slow) -> None:
    """kill -9: a broken stream. The last to use this server."""
    with httpx.stream("POST", slow.url + "/v1/completions", json={**LONG, "stream": True}, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        slow.process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            for line in lines:
                assert line != "data: [DONE]"
    assert slow.process.wait(30) == -signal.SIGKILL


def test_a_drain_that_lasts_too_long_ends_streams_with_an_error(target) -> None:
    """Its second is over before the hundredth answer."""
    server = ServerProcess("--target", target, *COMMON, "--max-running", 1, "--max-waiting", 200, "--drain-timeout", 1)
    body = {**LONG, "n": 100, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        server.process.terminate()
        *_, error, done = (line.removeprefix("data: ") for line in lines)
    assert json.loads(error)["error"]["type"] == "server_error" and done == "[DONE]"
    assert server.process.wait(30) == 0 and server.event("stopped", reason="drained")


# An engine that fails once it has a request of 479 tokens:
FAILING = """
import sys
from spec.engine import Engine
from spec.serve.__main__ import main
step = Engine.step
def failing(self):
    more = step(self)
    if any(task.request.max_tokens == 479 for task in self._tasks.values()):
        raise RuntimeError("the device is gone")
    return more
Engine.step = failing
sys.exit(main())
"""


def test_an_engine_that_fails_ends_its_requests_and_the_process(target) -> None:
    server = ServerProcess("--target", target, *COMMON, program=("-c", FAILING))
    with httpx.stream("POST", server.url + "/v1/completions", json={**LONG, "stream": True}, timeout=30) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        last = httpx.post(server.url + "/v1/completions", json={**LONG, "max_tokens": 479})
        *_, error, done = (line.removeprefix("data: ") for line in lines)
    message = "the engine failed (RuntimeError): the request is lost"
    assert last.status_code == 500 and last.json()["error"]["message"] == message
    assert json.loads(error)["error"]["message"] == message and done == "[DONE]"
    assert server.process.wait(30) == 1 and server.event("stopped", reason="engine failed")
    assert "the device is gone" in server.event("engine_failed")["error"]


def test_a_log_line_is_one_write() -> None:
    """Threads that log at once cannot cut each other's lines."""
    writes: list[str] = []
    stream = io.StringIO()
    stream.write = writes.append  # type: ignore[method-assign, assignment]
    RequestLog(stream=stream).write("engine_failed", error="the device is gone", request=None)
    (line,) = writes
    assert line.endswith("}\n") and json.loads(line)["error"] == "the device is gone" and "request" not in line


def test_without_an_engine_the_server_is_alive_and_not_ready(target) -> None:
    from spec.serve.app import make_app
    from spec.serve.options import parse
    from spec.serve.start import make_service

    service = make_service(parse(["--target", str(target), *map(str, COMMON)]))

    def fail() -> bool:
        raise RuntimeError("the device is gone")

    async def program() -> dict[str, int]:
        service.worker.start()
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            statuses = {"before": (await client.get("/health/ready")).status_code}
            service.worker.engine.step = fail  # type: ignore[method-assign]
            for name in ("lost", "refused"):
                statuses[name] = (await client.post("/v1/completions", json=LONG)).status_code
            for path in ("ready", "live"):
                statuses[path] = (await client.get(f"/health/{path}")).status_code
            return statuses

    assert asyncio.run(program()) == {"before": 200, "lost": 500, "refused": 503, "ready": 503, "live": 200}
