"""Which engine serves: ours (``torch``), or vLLM's own server with this project's plugin (``vllm``)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import sysconfig
from argparse import Namespace
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from spec import loading
from spec.serve.options import TORCH_ONLY, changed

_AUTO_LENGTH = 4  # vLLM drafts a fixed number of tokens


def choose(options: Namespace) -> tuple[str, str]:
    """The backend and why. Raises ValueError for a choice that cannot be."""
    ours = changed(options, TORCH_ONLY)
    installed = importlib.util.find_spec("vllm") is not None
    if options.backend == "torch":
        return "torch", "asked for"
    if options.backend == "vllm":
        if not installed:
            raise ValueError("--backend vllm: vLLM is not installed; `pip install vllm`, or use --backend torch")
        if ours:
            raise ValueError(f"--backend vllm: {', '.join(ours)}: only the torch backend has it; leave it out")
        return "vllm", "asked for"
    if not _gpu(options):
        return "torch", "no GPU: on a CPU its forward pass is the faster one for a few sequences"
    if not installed:
        return "torch", "vLLM is not installed"
    if ours:
        return "torch", f"only it has {', '.join(ours)}"
    if options.draft is not None and options.draft != "ngram" and "/" not in options.draft:
        return "torch", f"vLLM has no drafter '{options.draft}'"
    return "vllm", "a GPU, and vLLM is installed; its plugin refuses to start where sampling is not exact"


@dataclass(frozen=True)
class Command:
    """A program to become."""

    argv: tuple[str, ...]
    environment: dict[str, str]

    def run(self) -> None:
        """Replaces this process; does not return."""
        os.execve(sys.executable, list(self.argv), self.environment)


def vllm_command(options: Namespace) -> Command:
    """vLLM's OpenAI server with the plugin's environment and a speculative configuration.

    The key goes through the environment: command lines are there for everyone to read. Raises ValueError for what vLLM
    cannot do, and for names that nothing can be.
    """
    loading.check_names(options.target, options.draft)
    name = options.served_model_name or default_name(options.target)
    argv = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.target, "--served-model-name",
        name, "--host", options.host, "--port", str(options.port), "--dtype", options.dtype, "--max-num-seqs",
        str(options.max_running), "--generation-config", "vllm",  # defaults are the API's, not the model's
        "--allowed-origins", json.dumps(options.cors_origin), "--shutdown-timeout", str(options.drain_timeout),
    ]  # fmt: skip
    if options.max_model_len is not None:
        argv += ["--max-model-len", str(options.max_model_len)]
    speculation = _speculation(options)
    if speculation is not None:
        argv += ["--speculative-config", json.dumps(speculation)]
    added = {"VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}  # the V2 runner has no self-test here
    if options.api_key is not None:
        added["VLLM_API_KEY"] = options.api_key
    if options.device == "cuda" and not _gpu(options):
        raise ValueError("--device cuda: there is no GPU")
    inherited = {k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"}  # which could leave ours out
    return Command(tuple(argv), {**inherited, **(_cpu_preloads() if not _gpu(options) else {}), **added})


def default_name(target: str) -> str:
    """A hub id as it is, a directory by its last component."""
    return Path(target).resolve().name if Path(target).is_dir() else target


def _speculation(options: Namespace) -> dict[str, object] | None:
    loading.draft_length(options.draft_length)
    length = _AUTO_LENGTH if options.draft_length == "auto" else int(options.draft_length)
    if options.draft is None or length == 0:
        return None
    if options.draft == "ngram":
        return {"method": "ngram", "num_speculative_tokens": length, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    if options.draft == "suffix" or options.draft.startswith(("ngram+", "suffix+")):
        raise ValueError(
            f"--backend vllm: vLLM has no drafter '{options.draft}'; use a model, ngram, or --backend torch"
        )
    return {
        "method": "draft_model", "model": options.draft, "num_speculative_tokens": length,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip


def _gpu(options: Namespace) -> bool:
    """Whether there is a GPU that is not hidden, without importing torch."""
    if options.device == "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def _cpu_preloads() -> dict[str, str]:
    """Intel's OpenMP and tcmalloc where they are installed: vLLM is half again as fast with them."""
    openmp = [path for path in (Path(sysconfig.get_path("data")) / "lib" / "libiomp5.so",) if path.exists()]
    malloc = sorted(glob("/usr/lib/*/libtcmalloc_minimal.so.4"))[:1]
    present = [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    preloads = [*present, *(str(path) for path in (*openmp, *malloc) if str(path) not in present)]
    return {"LD_PRELOAD": ":".join(preloads)} if preloads else {}
