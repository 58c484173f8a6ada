"""What a run will take: memory, disk, and the models' licences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from onpolicy import checks
from onpolicy.config import TrainConfig
from onpolicy.doctor.findings import Finding
from onpolicy.evaluate.provenance import UNKNOWN, origin_of
from onpolicy.losses.chunked import BUFFER_BYTES
from onpolicy.metrics import peak_rss_gib
from onpolicy.models import base_model
from spec.runtime import LARGEST_CACHE

if TYPE_CHECKING:
    from onpolicy.student import Student

_GIB = 2**30
_FREE_LICENCES = ("apache-2.0", "mit", "bsd", "cc0", "cc-by-4.0", "cc-by-sa-4.0", "unlicense", "isc", "odc-by")
_LIBRARIES = 1.0 * _GIB  # torch, transformers and vLLM themselves
_CGROUP = Path("/sys/fs/cgroup")


def licence(model: str, whose: str = "teacher's") -> Finding:
    """What is known, on this machine, of a model's licence."""
    origin = origin_of(model)
    found = f"{origin.name}: {origin.licence}"
    if origin.licence.lower().startswith(_FREE_LICENCES):
        return Finding("ok", f"{whose} licence", found)
    stated = "no licence was found" if origin.licence == UNKNOWN else "a licence with terms of its own"
    return Finding(
        "warning", f"{whose} licence", f"{found} ({stated})",
        "some licences forbid training other models on a model's output: the student could not be published",
        "read the model's licence; it goes into the student's model card as it is stated in the teacher's README.md",
    )  # fmt: skip


def disk(directory: Path, trained: int, student: int, config: TrainConfig) -> Finding:
    """Room for checkpoints (weights and two averages in float32), one more while saving, and the student in bf16.

    Args:
        trained, student: parameters trained, and of the student in all.
    """
    needed = 12 * trained * (config.checkpoint.keep + 1) + 2 * student
    try:
        checks.check_disk(directory, needed)
    except ValueError as error:
        found, _, remedy = str(error).partition("; ")
        return Finding("error", "disk", found, "the run stops while saving, hours in", remedy)
    return Finding("ok", "disk", f"checkpoints and student need about {needed / _GIB:.1f} GiB, and there is room")


def run_directory(directory: Path, resume: bool) -> Finding:
    try:
        checks.check_directory(directory, resume)
    except ValueError as error:
        found, _, remedy = str(error).partition(": ")
        return Finding("warning", "run's directory", found, "training refuses to start", remedy)
    return Finding("ok", "run's directory", f"'{directory}' " + ("is to be continued" if resume else "is free"))


@dataclass(frozen=True)
class Memory:
    """Bytes of a run at its largest, by what holds them."""

    parts: dict[str, int]
    available: int
    measured: int  # the most this process has held so far: with models, engine and an update, a lower bound

    @property
    def needed(self) -> int:
        return max(sum(self.parts.values()), self.measured)


def memory(needs: Memory) -> Finding:
    """The sum against what is free."""
    parts = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in needs.parts.items())
    found = (
        f"at least {needs.needed / _GIB:.1f} of {needs.available / _GIB:.1f} GiB available (estimated: {parts}; "
        f"the examination itself has held {needs.measured / _GIB:.1f})"
    )
    share = needs.needed / needs.available
    if share <= 0.8:
        return Finding("ok", "memory", found)
    return Finding(
        "error" if share > 1 else "warning", "memory", found,
        "the process is killed at the first large batch, or the machine swaps (cf. swift#10097, vllm#52054)",
        "lower batching.token_budget, rollouts.kv_cache_gib or rollouts.max_num_seqs; set student.freeze_embeddings, "
        "or train an adapter (student.lora.rank)",
    )  # fmt: skip


def memory_parts(
    student: Student, panel: Sequence[torch.nn.Module], saved_per_position: float, longest: int, config: TrainConfig
) -> dict[str, int]:
    """What lies in memory during an update.

    Args:
        panel: every model that scores.
        saved_per_position: bytes kept for the backward pass by each position of a batch, as measured.
        longest: tokens of the longest prompt and completion together.
    """
    base = base_model(student.model).config.get_text_config()
    trained = sum(p.numel() for p in student.trainable().values())
    width = getattr(torch, config.rollouts.dtype).itemsize
    head_dim = getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads
    per_token = 2 * base.num_hidden_layers * (base.num_key_value_heads or base.num_attention_heads) * head_dim * width
    cache = min(per_token * longest * config.rollouts.max_num_seqs, LARGEST_CACHE)
    if config.rollouts.kv_cache_gib is not None:
        cache = int(config.rollouts.kv_cache_gib * _GIB)
    kind = student.device.type
    return {
        "libraries": int(_LIBRARIES) if kind == "cpu" else 0,
        "teacher" if len(panel) == 1 else "teachers": sum(map(tensor_bytes, panel)),
        "student": tensor_bytes(student.model),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": int(saved_per_position * config.batching.token_budget),
        "loss": BUFFER_BYTES.get(kind, BUFFER_BYTES["cpu"]),
        # On a CPU vLLM keeps a packed copy of every matrix beside it.
        "sampler": sum(p.numel() for p in student.model.parameters()) * width * (2 if kind == "cpu" else 1),
        "keys and values": cache,
    }


def tensor_bytes(module: torch.nn.Module) -> int:
    """Of parameters and buffers; tied ones once."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def held_bytes(device: torch.device) -> int:
    """The most this process has held so far, on the GPU or in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(peak_rss_gib() * _GIB)


def available_bytes(device: torch.device) -> int:
    """What this process may still take: of the GPU, or of the machine and its container (cgroup v2)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free
