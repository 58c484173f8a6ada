"""Servers under load: plain and speculative, ours and vLLM's, the same requests from this process to each.

Three loads of ``--requests`` streamed chats each, no prompt twice, every answer exactly ``--tokens`` long:

- ``alone``: closed loop, one client, the next request when the last has ended (batch 1);
- ``full``: closed loop, ``--clients`` clients, so that the server is saturated;
- ``poisson``: open loop, arrivals at random at ``--rate`` requests a second, whether or not the server keeps up.
  By default at 0.7 of what the first server of the first round finished a second when full; the same for every server.

The requests are spread over ``--rounds``. In every other round the servers come in the opposite order, and ratios are
taken within a round, since a machine's speed drifts. 32 tokens an answer are meant to keep four servers below half an
hour on two cores; ``--loads alone --tokens 96`` is what benchmarks/decode.py measures at batch 1: only then are the
two compared.

Time to first token is taken from sending the request; per-token latency is a request's mean over the tokens after its
first. vLLM's server is started by ``python -m spec.serve --backend vllm``, with this project's repairs and tuning.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.common import ROOT, finish, tuned_cpu_env
from benchmarks.serve_load import MODEL, Load, Timing, figures

START_S = 600.0
LOADS = ("alone", "full", "poisson")
_WARM_UP = 4
_DECODE = ROOT / "benchmarks/results/decode.json"
Found = dict[str, dict[str, list[list[Timing]]]]  # server -> load -> a list of timings each round


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default=str(Path.home() / ".cache/onpolicy/smollm2-135m-instruct-v1"), metavar="DIR")
    add("--draft", default=str(ROOT / "runs/quickstart/student"), metavar="DIR", help="the quickstart's student")
    add("--servers", nargs="+", default=["ours-plain", "ours-speculative", "vllm-plain", "vllm-speculative"])
    add("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    add("--requests", type=int, default=200, help="of each load, all rounds together")
    add("--rounds", type=int, default=2)
    add("--tokens", type=int, default=32, help="of every answer")
    add("--clients", type=int, default=32, help="of the full load")
    add("--rate", type=float, help="requests a second of the Poisson load")
    add("--temperature", type=float, default=1.0)
    add("--draft-length", default="auto", metavar="K|auto", help="of our server")
    add("--vllm-draft-length", type=int, default=2, help="vLLM drafts a fixed number of tokens")
    add("--json", metavar="OUT", help="write the result here too")
    args = parser.parse_args()
    if "poisson" in args.loads and "full" not in args.loads and args.rate is None:
        parser.error("--rate is needed for the Poisson load without the full one")
    if not 1 <= args.rounds <= args.requests:
        parser.error("--rounds must be at least 1 and at most --requests")
    return args


def command(server: str, args: argparse.Namespace, port: int) -> list[str]:
    """How a server of this name is started. Raises ValueError for another name."""
    backend, _, kind = server.partition("-")
    if backend not in ("ours", "vllm") or kind not in ("plain", "speculative"):
        raise ValueError(f"unknown server {server!r}: ours or vllm, then -plain or -speculative")
    run = [sys.executable, "-m", "spec.serve", "--target", args.target, "--served-model-name", MODEL]
    run += ["--port", str(port), "--max-model-len", "2048", "--max-running", "64"]
    run += ["--backend", "torch" if backend == "ours" else "vllm"]
    if kind == "speculative":
        length = args.draft_length if backend == "ours" else str(args.vllm_draft_length)
        run += ["--draft", args.draft, "--draft-length", length]
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
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def prompts(count: int) -> list[str]:
    """So many of the built-in word problems, no two the same: a cache of prefixes must not favour a later load."""
    from onpolicy.prompts import word_problems

    found: dict[str, None] = {}
    for problem in word_problems(1):
        found[problem.question] = None
        if len(found) == count:
            return list(found)
    raise AssertionError("the built-in problems have no end")


def shares(args: argparse.Namespace) -> tuple[list[str], list[dict[str, list[str]]]]:
    """Prompts of the warm-up, and of each round's loads: all of them disjoint."""
    asked = iter(prompts(_WARM_UP + args.requests * len(args.loads)))
    warm_up = [next(asked) for _ in range(_WARM_UP)]
    sizes = [len(range(i, args.requests, args.rounds)) for i in range(args.rounds)]
    return warm_up, [{load: [next(asked) for _ in range(size)] for load in args.loads} for size in sizes]


async def measure(
    url: str, args: argparse.Namespace, warm_up: list[str], share: Mapping[str, list[str]], rate: float | None
) -> dict[str, list[Timing]]:
    """One round's loads on one server. ``rate`` None: 0.7 of what the full load finishes a second."""
    load = Load(url, args.tokens, args.temperature)
    await load.closed(warm_up, _WARM_UP)
    found: dict[str, list[Timing]] = {}
    for name, asked in share.items():
        if name == "poisson":
            found[name] = await load.poisson(asked, rate or default_rate(found["full"]), seed=0)
        else:
            found[name] = await load.closed(asked, 1 if name == "alone" else args.clients)
    await load.close()
    return found


def default_rate(full: list[Timing]) -> float:
    """Of the Poisson load."""
    return 0.7 * figures([full])["requests_s"]


def ratios(found: Found) -> dict[str, dict[str, Any]]:
    """Tokens a second of one server over another's in the same round: every round's, and their median."""
    result = {}
    for name, over, under in (
        ("ours_speculative_over_plain", "ours-speculative", "ours-plain"),
        ("vllm_speculative_over_plain", "vllm-speculative", "vllm-plain"),
        ("ours_over_vllm_plain", "ours-speculative", "vllm-plain"),
        ("ours_over_vllm_speculative", "ours-speculative", "vllm-speculative"),
    ):
        for load in ("alone", "full"):
            if load in found.get(over, {}) and load in found.get(under, {}):
                pairs = zip(found[over][load], found[under][load], strict=True)
                each = [figures([a])["tok_s"] / figures([b])["tok_s"] for a, b in pairs]
                result[f"{name}_{load}"] = {"median": statistics.median(each), "rounds": each}
    return result


def checks(measured: Mapping[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """What the server has to reach, and what it is held against; None where it was not measured."""
    full, alone = (measured.get(f"ours_speculative_over_plain_{load}") for load in ("full", "alone"))
    row, why_not = decode_row(args)
    gain = None if row is None else row["ratio_own_plain"]
    return {
        "saturated_at_least_0.95_of_plain": full and full["median"] >= 0.95,
        "batch_1_gain_at_least_decodes_less_10_percent": (
            None if gain is None or alone is None else alone["median"] >= 0.9 * gain
        ),
        "decode": {"gain": gain, "draft_length": row and row["draft_length"], "not_compared": why_not},
    }


def decode_row(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str | None]:
    """The same work without a server, from benchmarks/decode.py's result; or None and why it cannot be compared."""
    if not _DECODE.exists():
        return None, f"there is no {_DECODE.relative_to(ROOT)}"
    result = json.loads(_DECODE.read_text())
    theirs, mine = result["settings"]["tokens"], args.tokens
    if theirs != mine:
        return None, f"it measured answers of {theirs} tokens, not {mine}: give --tokens {theirs}"
    wanted = {"workload": "problems", "engine": "ours", "drafter": "draft", "batch": 1, "temperature": args.temperature}
    for row in result["results"]:
        if all(row[name] == value for name, value in wanted.items()):
            return row, None
    return None, f"it has no row for {wanted}"


def main() -> None:
    args = arguments()
    warm_up, rounds = shares(args)
    found: Found = {server: {load: [] for load in args.loads} for server in args.servers}
    rate = args.rate
    for index, share in enumerate(rounds):
        for server in args.servers[:: -1 if index % 2 else 1]:
            with running(server, args) as url:
                timings = asyncio.run(measure(url, args, warm_up, share, rate))
            if rate is None and "full" in timings:
                rate = default_rate(timings["full"])
            for load, mine in timings.items():
                found[server][load].append(mine)
                print_row(f"round {index + 1}  {server}", load, figures([mine]))
    rows = {server: {load: figures(each) for load, each in loads.items()} for server, loads in found.items()}
    print("\nall rounds")
    for server, loads in rows.items():
        for load, row in loads.items():
            print_row(server, load, row)
    measured = ratios(found)
    for name, ratio in measured.items():
        print(f"{name:40}{ratio['median']:6.2f}   " + "  ".join(f"{each:.2f}" for each in ratio["rounds"]))
    held = checks(measured, args)
    print(*(f"{name}: {value}" for name, value in held.items()), sep="\n")
    settings = {name: value for name, value in vars(args).items() if name != "json"} | {"rate": rate}
    finish({"settings": settings, "servers": rows, "ratios": measured, "checks": held}, args.json)


def print_row(title: str, load: str, row: Mapping[str, float]) -> None:
    print(f"{title:28}{load:9}" + "".join(f"{name} {row[name]:.1f}  " for name in row), flush=True)


if __name__ == "__main__":
    main()
