"""The quickstart's student drafting for its teacher behind the server: same law, no error, no leak, a hard end.

``SERVE_SOAK_SECONDS`` sets the length of the soak (default 60), ``SERVE_SOAK_JSON`` writes what came of it; `make soak`
sets both.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from spec.provenance import provenance, write_atomically
from tests.serve_process import ROOT, ServerProcess
from tests.serve_soak import QUESTION, Soak

TEACHER = Path(os.environ.get("ONPOLICY_CACHE") or Path.home() / ".cache/onpolicy") / "smollm2-135m-instruct-v1"
STUDENT = ROOT / "runs/quickstart/student"
SECONDS = float(os.environ.get("SERVE_SOAK_SECONDS", "60"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600 + 2 * SECONDS),
    pytest.mark.skipif(not TEACHER.is_dir() or not STUDENT.is_dir(), reason="needs `make quickstart`"),
]


@pytest.fixture(scope="module")
def server():
    server = ServerProcess(
        "--target", TEACHER, "--draft", STUDENT, "--backend", "torch", "--max-running", 8, "--max-waiting", 16,
        "--admin-key", "k", wait_s=300,
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


def test_soak(server) -> None:
    """Everything clients do, from twelve of them: no 5xx, streams end properly, memory flat over the last third."""
    soak = Soak(
        server.url, server.process.pid, SECONDS, admin_key="k", drafts=("ngram", str(STUDENT), None, f"ngram+{STUDENT}")
    )
    soak.run()
    statuses, total = soak.by_status(), sum(soak.statuses.values())
    growth, settings = soak.growth(), {"target": TEACHER.name, "draft": "runs/quickstart/student"}
    result = {
        "seconds": SECONDS, "requests": total, "by_status": statuses, "faults": soak.faults, **settings,
        "slowest_s": round(soak.slowest_s, 1),
        "by_kind": {f"{kind} {status or 'left'}": n for (kind, status), n in sorted(soak.statuses.items())},
        "memory_max_over_min_last_third": growth,
        "memory_mib": soak.memory_mib[:: max(len(soak.memory_mib) // 200, 1)],
    }  # fmt: skip
    if path := os.environ.get("SERVE_SOAK_JSON"):
        write_atomically(Path(path), json.dumps({**result, "provenance": provenance()}) + "\n")
    print(f"{total} requests, {statuses}, growth {growth:.4f}")
    assert not soak.faults, soak.faults[:5]
    assert set(statuses) <= {"left", "200", "400", "404", "413", "422", "429"}, statuses
    assert statuses["200"] > 0.2 * total
    server.settled("vllm:num_requests_running", 0)
    server.settled("vllm:num_requests_waiting", 0)
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
