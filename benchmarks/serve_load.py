"""Requests to one server, closed loop or open loop, and what their timings say."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

MODEL = "bench"


@dataclass(frozen=True)
class Timing:
    """One answered request, seconds on one clock."""

    sent: float
    first: float  # the first text that shows
    last: float
    tokens: int

    @property
    def per_token(self) -> float:
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else 0.0


class Load:
    """Streamed chats to one server. Raises RuntimeError for an answer that is an error or of the wrong length."""

    def __init__(self, url: str, tokens: int, temperature: float):
        self._tokens, self._temperature = tokens, temperature
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=url, timeout=600, limits=limits)

    async def ask(self, prompt: str) -> Timing:
        """One request, to its end."""
        body = {
            "model": MODEL, "messages": [{"role": "user", "content": prompt}], "stream": True,
            "max_tokens": self._tokens, "temperature": self._temperature, "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        sent, first, last, tokens, error = time.perf_counter(), 0.0, 0.0, 0, ""
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                error = error or str(chunk.get("error") or "")
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                if any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                    last = time.perf_counter()
                    first = first or last
        if answer.status_code != 200 or error or tokens != self._tokens:
            raise RuntimeError(f"status {answer.status_code}, {tokens} tokens instead of {self._tokens} {error}")
        ended = time.perf_counter()  # of an answer without any text that shows, the end is its first sign
        return Timing(sent, first or ended, last or ended, tokens)

    async def closed(self, prompts: Sequence[str], clients: int) -> list[Timing]:
        """Every client sends its next request when its last has ended."""
        waiting: Iterator[str] = iter(prompts)
        done = []

        async def client() -> None:
            for prompt in waiting:
                done.append(await self.ask(prompt))

        await asyncio.gather(*(client() for _ in range(clients)))
        return done

    async def poisson(self, prompts: Sequence[str], rate: float, seed: int) -> list[Timing]:
        """Arrivals with exponential gaps of ``rate`` requests a second; of a seed they are always the same."""
        draw, tasks = random.Random(seed), []
        for prompt in prompts:
            tasks.append(asyncio.create_task(self.ask(prompt)))
            await asyncio.sleep(draw.expovariate(rate))
        return list(await asyncio.gather(*tasks))

    async def close(self) -> None:
        await self._client.aclose()


def figures(rounds: Sequence[Sequence[Timing]]) -> dict[str, float]:
    """Of one load in one or several rounds: throughput, and latencies at p50 and p95, milliseconds."""
    timings = [timing for timings in rounds for timing in timings]
    seconds = sum(max(t.last for t in timings) - min(t.sent for t in timings) for timings in rounds)

    def at(values: list[float], name: str) -> dict[str, float]:
        cuts = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
        return {f"{name}_p50_ms": 1000 * cuts[9], f"{name}_p95_ms": 1000 * cuts[18]}

    return {
        "tok_s": sum(t.tokens for t in timings) / seconds,
        "requests_s": len(timings) / seconds,
        **at([t.first - t.sent for t in timings], "ttft"),
        **at([t.per_token for t in timings], "per_token"),
    }
