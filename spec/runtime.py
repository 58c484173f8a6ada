"""CPU tuning that has to be in place before the interpreter starts: preloaded libraries and threads.

``ensure_tuned()`` at the top of a program's ``main`` (before torch is imported) starts the same command once more
with a better environment. It does nothing on a GPU machine, under ``ONPOLICY_NO_TUNE=1``, for ``--help``, or when
nothing would change; variables the user has set are kept.

What it arranges, and why:

- ``LD_PRELOAD`` of Intel's OpenMP (the wheel ``intel-openmp``, installed with the extra ``cpu``) in place of the
  one torch ships: its parallel regions start sooner, and there are a thousand of them in a decoded batch. Of
  tcmalloc too, where the system has it.
- As many OpenMP threads as there are physical cores *this process may use*: by affinity and by the container's
  quota. More threads than that wait for each other in every parallel region.
"""

from __future__ import annotations

import glob
import math
import os
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

LARGEST_CACHE = 4 * 2**30  # bytes of vLLM's keys and values on a CPU, where nobody says how many
_GUARD = "ONPOLICY_TUNED"  # set in the environment of the restarted program, so that it restarts no more
_OFF = "ONPOLICY_NO_TUNE"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
_TCMALLOC = ("/usr/lib/*/libtcmalloc_minimal.so.4", "/usr/lib/*/libtcmalloc.so.4", "/usr/lib64/libtcmalloc*.so.4")
# Read when a program (not a library) starts; harmless to set for children as well.
_DEFAULTS = {
    "TOKENIZERS_PARALLELISM": "false",  # its threads do not survive the fork of a data loader
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # "NUMA binding: ..." on every start
    "KMP_WARNINGS": "0",  # "omp_set_nested routine deprecated", whenever numba starts its threads
}


def ensure_tuned(argv: list[str] | None = None) -> None:
    """Restart this program once with the tuned environment, where that helps; otherwise return.

    Args:
        argv: the arguments of the program, to leave ``--help`` alone; ``sys.argv[1:]`` when not given.

    Does not return when it restarts: the process is replaced (same id, same command line, same open files).
    """
    arguments = sys.argv[1:] if argv is None else argv
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not _worthwhile(arguments):
        return
    cores = physical_cores(os.sched_getaffinity(0))
    changes = tuned_environment(os.environ, cores, quota(), preloads())
    if not changes:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # orig_argv is the whole command: `-m module`, -X and -W options are kept.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **changes, _GUARD: "1"})


def tuned_environment(
    environment: Mapping[str, str], cores: list[int], limit: int | None, libraries: Iterable[str]
) -> dict[str, str]:
    """What to add to ``environment``; empty when it needs nothing. Pure.

    Args:
        cores: one logical CPU for each physical core that may be used, e.g. [0, 1].
        limit: CPUs the container may keep busy, or None.
        libraries: paths to preload.
    """
    used = cores[:limit] if limit else cores
    wanted = {"OMP_NUM_THREADS": str(len(used)), "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, used))}
    changes = {name: value for name, value in wanted.items() if name not in environment}
    present = [path for path in environment.get("LD_PRELOAD", "").replace(" ", ":").split(":") if path]
    kinds = {_kind(path) for path in present}
    # Of two OpenMP runtimes or two allocators the first would win, and the second only take memory.
    added = [path for path in libraries if _kind(path) not in kinds]
    if added:
        changes["LD_PRELOAD"] = ":".join(present + added)
    return changes


def preloads() -> list[str]:
    """Libraries found on this machine that make torch's CPU kernels faster."""
    openmp = [str(path) for path in (Path(sysconfig.get_path("data")) / "lib" / "libiomp5.so",) if path.exists()]
    malloc = [path for pattern in _TCMALLOC for path in sorted(glob.glob(pattern))][:1]
    return openmp + malloc


def physical_cores(allowed: Iterable[int]) -> list[int]:
    """One logical CPU for each physical core among ``allowed``: two threads of a core share its vector units."""
    first: dict[str, int] = {}
    for cpu in sorted(allowed):
        path = Path(_TOPOLOGY.format(cpu))
        first.setdefault(path.read_text().strip() if path.exists() else str(cpu), cpu)
    return sorted(first.values())


def quota() -> int | None:
    """How many CPUs the container may keep busy (cgroup v2, rounded up), or None where there is no limit."""
    if not _QUOTA.exists():
        return None
    allowance, period = _QUOTA.read_text().split()
    return None if allowance == "max" else max(1, math.ceil(int(allowance) / int(period)))


def _worthwhile(arguments: list[str]) -> bool:
    if sys.platform != "linux" or os.environ.get(_OFF) == "1" or _GUARD in os.environ:
        return False
    if {"-h", "--help", "--version", "--print_config"} & {argument.split("=")[0] for argument in arguments}:
        return False
    # A restart repeats the command: impossible for a program read from stdin or typed at the prompt.
    if not sys.orig_argv[1:] or sys.orig_argv[-1] == "-" or hasattr(sys, "ps1"):
        return False
    return "torch" not in sys.modules and not gpu_present(os.environ)


def gpu_present(environment: Mapping[str, str]) -> bool:
    """Whether there is a GPU that has not been hidden, without importing torch (which is slow)."""
    hidden = environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return not hidden and (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists())


def _kind(path: str) -> str:
    name = Path(path).name
    if any(part in name for part in ("libiomp", "libomp", "libgomp")):
        return "openmp"
    return "malloc" if any(part in name for part in ("tcmalloc", "jemalloc", "mimalloc")) else name
