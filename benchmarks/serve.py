"""Servers under load: plain and speculative, ours and vLLM's, the same requests from this process to each in turn.

Three loads of ``--requests`` streamed chats each, every answer exactly ``--tokens`` long:

- ``alone``: closed loop, one client, the next request when the last has ended (batch 1);
- ``full``: closed loop, ``--clients`` clients, so that the server is saturated;
- ``poisson``: open loop, arrivals at random at ``--rate`` requests a second, whether or not the server keeps up.
  By default at 0.7 of what our plain server finished a second when full; the same for every server.

Time to first token is taken from sending the request; per-token latency is a request's mean over the tokens after its
first. vLLM's server is started by ``python -m spec.serve --backend vllm``, with this project's repairs and tuning.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, finish, tuned_cpu_env

MODEL = "bench"
START_S = 600.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default=str(Path.home() / ".cache/onpolicy/smollm2-135m-instruct-v1"), metavar="DIR")
    add("--draft", default=str(ROOT / "runs/quickstart/student"), metavar="DIR", help="the quickstart's student")
    add("--servers", nargs="+", default=["ours-plain", "ours-speculative", "vllm-plain", "vllm-speculative"])
    add("--requests", type=int, default=200, help="of each load")
    add("--tokens", type=int, default=64, help="of every answer")
    add("--clients", type=int, default=32, help="of the full load")
    add("--rate", type=float, help="requests a second of the Poisson load")
    add("--temperature", type=float, default=1.0)
    add("--vllm-draft-length", type=int, default=2, help="vLLM drafts a fixed number of tokens")
    add("--json", metavar="OUT", help="write the result here too")
    return parser.parse_args()


@dataclass(frozen=True)
class Timing:
    """One answered request, seconds."""

    sent: float
    first: float
    last: float
    tokens: int

    @property
    def per_token(self) -> float:
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


class Load:
    """Streamed chats to one server. Raises RuntimeError for an answer that is an error or of the wrong length."""

    def __init__(self, url: str, prompts: Sequence[str], tokens: int, temperature: float):
        self._prompts, self._tokens, self._temperature = prompts, tokens, temperature
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=url, timeout=600, limits=limits)

    async def ask(self, i: int) -> Timing:
        """Request i, to its end."""
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": self._prompts[i]}], "stream": True,
            "max_tokens": self._tokens, "temperature": self._temperature, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        sent, first, last, tokens = time.perf_counter(), 0.0, 0.0, 0
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                    last = time.perf_counter()
                    first = first or last
        if answer.status_code != 200 or tokens != self._tokens:
            raise RuntimeError(f"request {i}: status {answer.status_code}, {tokens} tokens instead of {self._tokens}")
        return Timing(sent, first, last, tokens)

    async def closed(self, clients: int) -> list[Timing]:
        """Every client sends its next request when its last has ended."""
        waiting, done = iter(range(len(self._prompts))), []

        async def client() -> None:
            for i in waiting:
                done.append(await self.ask(i))

        await asyncio.gather(*(client() for _ in range(clients)))
        return done

    async def poisson(self, rate: float) -> list[Timing]:
        """Arrivals with exponential gaps, the same for every server."""
        draw, tasks = random.Random(0), []
        for i in range(len(self._prompts)):
            tasks.append(asyncio.create_task(self.ask(i)))
            await asyncio.sleep(draw.expovariate(rate))
        return list(await asyncio.gather(*tasks))

    async def close(self) -> None:
        await self._client.aclose()


def figures(timings: Sequence[Timing]) -> dict[str, float]:
    """Throughput over the whole load; latencies at p50 and p95, milliseconds."""
    seconds = max(t.last for t in timings) - min(t.sent for t in timings)

    def at(values: list[float], name: str) -> dict[str, float]:
        cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
        return {f"{name}_p50_ms": 1000 * cuts[9], f"{name}_p95_ms": 1000 * cuts[18]}

    return {
        "tok_s": sum(t.tokens for t in timings) / seconds,
        "requests_s": len(timings) / seconds,
        **at([t.first - t.sent for t in timings], "ttft"),
        **at([t.per_token for t in timings], "per_token"),
    }


def command(server: str, args: argparse.Namespace, port: int) -> list[str]:
    """How a server of this name is started. Raises ValueError for another name."""
    backend, _, kind = server.partition("-")
    if backend not in ("ours", "vllm") or kind not in ("plain", "speculative"):
        raise ValueError(f"unknown server {server!r}: ours or vllm, then -plain or -speculative")
    run = [sys.executable, "-m", "spec.serve", "--target", args.target, "--served-model-name", MODEL]
    run += ["--port", str(port), "--max-model-len", "2048", "--max-running", "64"]
    run += ["--backend", "torch" if backend == "ours" else "vllm"]
    if kind == "speculative":
        run += ["--draft", args.draft, "--draft-length", "auto" if backend == "ours" else str(args.vllm_draft_length)]
    return run


@contextmanager
def running(server: str, args: argparse.Namespace) -> Iterator[str]:
    """The server's URL once it is ready; it is gone afterwards. Raises RuntimeError, with its output, if it ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command(server, args, port), cwd=ROOT, env={**os.environ, **tuned_cpu_env()}, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + START_S
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() > end:
                    output.seek(0)
                    raise RuntimeError(f"{server} did not start; its output ended:\n{output.read()[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the engine processes vLLM starts
                process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def prompts(count: int) -> list[str]:
    """The built-in word problems."""
    from onpolicy.prompts import word_problems

    return [problem.question for problem in islice(word_problems(1), count)]


async def measure(url: str, args: argparse.Namespace, rate: float | None) -> dict[str, dict[str, float]]:
    """All loads on one server, after a few requests of warm-up."""
    questions = prompts(args.requests)
    warm = Load(url, questions[:4], args.tokens, args.temperature)
    load = Load(url, questions, args.tokens, args.temperature)
    await warm.closed(4)
    found = {}
    loads: dict[str, Any] = {"alone": lambda: load.closed(1), "full": lambda: load.closed(args.clients)}
    for name, run in loads.items():
        found[name] = figures(await run())
    rate = rate or 0.7 * found["full"]["requests_s"]
    work: Coroutine[Any, Any, list[Timing]] = load.poisson(rate)
    found["poisson"] = {**figures(await work), "rate": rate}
    await warm.close()
    await load.close()
    return found


def main() -> None:
    args = arguments()
    found: dict[str, dict[str, dict[str, float]]] = {}
    rate = args.rate
    for server in args.servers:
        with running(server, args) as url:
            found[server] = asyncio.run(measure(url, args, rate))
        rate = rate or found[server]["poisson"]["rate"]
        for load, row in found[server].items():
            print(f"{server:18}{load:9}" + "".join(f"{name} {row[name]:.1f}  " for name in row), flush=True)
    finish({"settings": {k: v for k, v in vars(args).items() if k != "json"}, **found, **ratios(found)}, args.json)


def ratios(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Speculative over plain, and ours over vLLM's, in tokens a second."""
    result = {}
    for name, over, under in (
        ("ours_speculative_over_plain", "ours-speculative", "ours-plain"),
        ("vllm_speculative_over_plain", "vllm-speculative", "vllm-plain"),
        ("ours_over_vllm_plain", "ours-speculative", "vllm-plain"),
        ("ours_over_vllm_speculative", "ours-speculative", "vllm-speculative"),
    ):
        if over in found and under in found:
            for load in ("alone", "full"):
                result[f"{name}_{load}"] = found[over][load]["tok_s"] / found[under][load]["tok_s"]
    return result


if __name__ == "__main__":
    main()
