"""What every benchmark shares: peak memory, a peer measured in a process of its own, the last line.

A benchmark prints a table for people and then, as its very last line, one JSON object; ``--json OUT`` also writes that
object with the commit, the versions and the machine, so that a number can always be traced to what produced it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self, TypeVar

from spec import runtime
from spec.provenance import proc_field, provenance, write_atomically

ROOT = Path(__file__).resolve().parent.parent
_MIB = 2**20
T = TypeVar("T")


def finish(result: Mapping[str, Any], json_out: str | os.PathLike[str] | None = None) -> None:
    """Print ``result`` as one JSON line, to be called last; with ``json_out`` write it with its provenance, atomically.

    Raises ValueError where a number is not finite: NaN is not JSON, and no result either.
    """
    line = json.dumps(result, allow_nan=False)
    if json_out is not None:
        write_atomically(Path(json_out), json.dumps({**result, "provenance": provenance()}, indent=2) + "\n")
    print(line, flush=True)


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """Of a benchmark that times calls in this process."""
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="OUT", help="also write the result there, with commit, versions and machine")


def rss_mib() -> float:
    """Resident memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def peak_rss_mib() -> float:
    """Highest resident memory of this process since it started, MiB (the kernel's VmHWM)."""
    field = proc_field("/proc/self/status", "VmHWM")  # "123456 kB"
    assert field is not None, "a Linux kernel reports VmHWM"
    return int(field.split()[0]) / 1024


def device_peak_mib() -> float:
    """The most that torch has allocated on the GPU in this process, MiB; 0 without one."""
    import torch

    return torch.cuda.max_memory_allocated() / _MIB if torch.cuda.is_available() else 0.0


class PeakSampler:
    """Highest resident memory of this process between two moments, MiB: for the peak of one phase.

    A thread looks every ``interval_s``; a spike shorter than that can be missed, which :func:`peak_rss_mib` would see.

    >>> with PeakSampler() as memory:
    ...     update()
    ...     print(memory.reset())  # the peak of the update; the next one starts from here
    """

    def __init__(self, interval_s: float = 0.005) -> None:
        self._interval_s = interval_s
        self._peak_mib = rss_mib()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def peak_mib(self) -> float:
        """The peak since the start or the last :meth:`reset`."""
        self._look()
        return self._peak_mib

    def reset(self) -> float:
        """Return the peak so far and begin anew from what is resident now."""
        peak = self.peak_mib
        with self._lock:
            self._peak_mib = rss_mib()
        return peak

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        with self._lock:
            self._peak_mib = max(self._peak_mib, rss_mib())


def in_subprocess(
    argv: Sequence[str], *, env: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> dict[str, Any]:
    """Run ``python ARGV`` from the repository's root and return the JSON object of its last line.

    A fresh process gives each side of a comparison its own memory peak, threads and allocator. ``env`` is added to
    the environment; stderr is passed through.

    Raises RuntimeError, with the end of its output, when the process fails or prints no JSON object last;
    ``subprocess.TimeoutExpired`` after ``timeout_s``.
    """
    done = subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):
        tail = "\n".join(lines[-20:])
        raise RuntimeError(f"`python {' '.join(argv)}` exited {done.returncode}; its output ended:\n{tail}")
    return json.loads(lines[-1])


def call_in_subprocess(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a module-level function in a fresh interpreter (spawned, so VmHWM starts at nothing); return its result."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def tuned_cpu_env(threads: int | None = None) -> dict[str, str]:
    """What :mod:`spec.runtime` arranges for our own programs, as additions to the environment.

    Both sides of a comparison get them; they must be set before the process starts. ``threads``: in place of as many as
    there are cores.
    """
    inherited = {name: os.environ[name] for name in ("LD_PRELOAD",) if name in os.environ}
    cores = runtime.physical_cores(os.sched_getaffinity(0))
    return runtime.tuned_environment(inherited, cores, threads or runtime.quota(), runtime.preloads())
