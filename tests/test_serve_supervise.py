"""A supervised server: its end is never taken for success, signals reach it, nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spec.serve.supervise import answers

ROOT = Path(__file__).parents[1]
# A server with an engine of its own, like vLLM's: ready after a moment, status 0 when its engine has died.
SERVER = """
import http.server, signal, subprocess, sys, threading, time
engine = subprocess.Popen(["sleep", "600"])
print("engine", engine.pid, flush=True)
if MODE == "refuse":
    sys.exit(0)
drain = lambda *_: (print("drained", flush=True), sys.exit(0))
signal.signal(signal.SIGTERM, signal.SIG_IGN if MODE == "stubborn" else drain)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", PORT), Health)
threading.Thread(target=server.serve_forever, daemon=True).start()
while engine.poll() is None:
    time.sleep(0.02)
"""
SUPERVISOR = """
import os, sys
from spec.serve import supervise
supervise._GRACE_S = 0.2
argv = [sys.executable, "-c", SERVER]
url = "http://127.0.0.1:PORT/"
outcome = supervise.supervise(argv, os.environ, url, lambda: print("ready", flush=True), 0.1)
print(outcome.status, outcome.ready, flush=True)
"""


class Supervisor:
    """Runs SUPERVISOR; ``engine`` is the process id of its server's engine."""

    def __init__(self, mode: str = "serve"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        server = f"MODE, PORT = {mode!r}, {self.port}\n{SERVER}"
        program = f"SERVER = {server!r}\n" + SUPERVISOR.replace("PORT", str(self.port))
        self.process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self.engine = int(self.line().split()[1])

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.engine, signal.SIGKILL)


def gone(pid: int, wait_s: float = 5.0) -> bool:
    """Whether a process ends in time; one that nobody has reaped has ended."""
    end = time.monotonic() + wait_s
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_status_0_after_its_engine_died_is_a_failure() -> None:
    with Supervisor() as supervisor:
        assert supervisor.line() == "ready"
        os.kill(supervisor.engine, signal.SIGKILL)
        assert supervisor.line() == "1 True"
        assert not answers(f"http://127.0.0.1:{supervisor.port}/")


def test_an_end_before_it_was_ready_is_told_apart_and_leaves_nothing_behind() -> None:
    with Supervisor("refuse") as supervisor:
        assert supervisor.line() == "1 False"
        assert gone(supervisor.engine)


@pytest.mark.parametrize(("number", "status"), ((signal.SIGTERM, 0), (signal.SIGINT, 130)))
def test_signals_go_on_to_it_and_its_engine_goes_with_it(number: int, status: int) -> None:
    with Supervisor() as supervisor:
        assert supervisor.line() == "ready"
        supervisor.process.send_signal(number)
        if number == signal.SIGTERM:
            assert supervisor.line() == "drained"
        assert supervisor.line() == f"{status} True"
        assert gone(supervisor.engine)


def test_what_does_not_stop_is_killed() -> None:
    with Supervisor("stubborn") as supervisor:
        assert supervisor.line() == "ready"
        supervisor.process.terminate()
        assert supervisor.line() == "0 True"
        assert gone(supervisor.engine)


def test_it_does_not_outlive_a_killed_supervisor() -> None:
    with Supervisor() as supervisor:
        assert supervisor.line() == "ready"
        supervisor.process.kill()
        assert supervisor.line() == "drained"
