"""Users' mistakes, found before any model is loaded. Every check raises ValueError with the remedy."""

from __future__ import annotations

import shutil
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onpolicy.config import TrainConfig
from onpolicy.health_config import check_health
from onpolicy.models import check_model_exists, loading_options
from onpolicy.student import check_layers, evenly_spaced
from onpolicy.teachers.convert import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from onpolicy.types import Prompt


def check_settings(config: TrainConfig) -> None:
    """Values and combinations that cannot work, without touching a file."""
    from onpolicy.losses import names

    positive = [
        "prompts_per_step", "sampling.max_tokens", "sampling.samples_per_prompt", "batching.token_budget",
        "optim.updates_per_step", "optim.learning_rate", "checkpoint.every", "checkpoint.keep", "rollouts.max_num_seqs",
        "rollouts.parity_bound", "warm_start.epochs", "warm_start.samples_per_prompt", "warm_start.rollouts_per_step",
        "warm_start.learning_rate", "evaluation.max_tokens",
    ]  # fmt: skip
    for name in positive:
        value = attrgetter(name)(config)
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("steps", "warm_start.num_prompts", "evaluation.num_prompts", "student.lora.rank"):
        value = attrgetter(name)(config)
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if config.steps == 0 and config.warm_start.num_prompts == 0:
        raise ValueError("steps: 0 and warm_start.num_prompts: 0 leave nothing to do; set one of them")
    for option, divergence in (("gkd", config.gkd.divergence), ("warm_start", config.warm_start.divergence)):
        if divergence not in names():
            raise ValueError(f"{option}.divergence: '{divergence}' is not known; choose one of {', '.join(names())}")
    if not 0 <= config.gkd.beta <= 1 or not 0 <= config.gkd.lmbda <= 1:
        raise ValueError(f"gkd.beta and gkd.lmbda must be in [0, 1], got {config.gkd.beta} and {config.gkd.lmbda}")
    check_health(config.health, config.sampling.max_tokens)
    if config.evaluation.num_prompts > config.prompts.heldout_size:
        raise ValueError(
            f"evaluation.num_prompts is {config.evaluation.num_prompts} but only prompts.heldout_size="
            f"{config.prompts.heldout_size} prompts are held out; lower the first or raise the second"
        )


def check_directory(directory: Path, resume: bool) -> None:
    """Refuse a directory that already holds a run, unless it is to be continued."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"'{directory}' is a file; choose another --name or --output_dir")
    if not resume and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"'{directory}' already holds a run: continue it with --resume, or choose another --name")


def check_models(config: TrainConfig) -> tuple[PretrainedConfig, PretrainedConfig | None]:
    """The configurations of teacher and student (None: pruned from the teacher); layer choices are checked."""
    teacher = read_model_config(config.teacher.model, "teacher.model")
    if config.student.model is not None:
        return teacher, read_model_config(config.student.model, "student.model")
    of = teacher.num_hidden_layers
    if config.student.layers is not None:
        check_layers(config.student.layers, of)
    else:
        evenly_spaced(config.student.num_layers, of)
    return teacher, None


def read_model_config(name: str, option: str) -> PretrainedConfig:
    """A model's config.json; ValueError naming the option when there is no such model."""
    from transformers import AutoConfig

    check_model_exists(name, option)
    path = resolve_model(name)
    try:
        return AutoConfig.from_pretrained(path, **loading_options(path)).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: cannot read the configuration of '{name}': {error}") from error


def check_vocabularies(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, teacher_rows: int, student_rows: int
) -> None:
    """Same tokens under the same ids; output rows beyond them (padding for speed) may differ in number."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
        raise ValueError(
            f"teacher and student have different tokenizers: {len(different)} tokens differ, e.g. {different[:5]}. The "
            "teacher scores the student's tokens one by one, so both must share a vocabulary: choose a student of the "
            "teacher's family, or prune one from it (leave student.model unset)"
        )
    used = max(ours.values()) + 1
    if used > min(teacher_rows, student_rows):
        raise ValueError(
            f"the tokenizer has ids up to {used - 1} but the teacher has {teacher_rows} output rows and the student "
            f"{student_rows}: a model without a row for every token cannot be scored; use matching checkpoints"
        )


def check_same_rendering(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, config: TrainConfig
) -> None:
    """Both chat templates must render alike: a teacher that reads other text scores every token wrongly."""
    from onpolicy.prompts import render

    if config.prompts.template != "chat" or config.prompts.chat_template or not teacher.chat_template:
        return
    probe = [{"role": "user", "content": "How many legs have 3 cats?"}]
    if render(teacher, probe) != render(student, probe):
        raise ValueError(
            "teacher and student have different chat templates: the teacher would score text it never saw in training. "
            "Set prompts.chat_template to the teacher's template file"
        )


def check_completions(config: TrainConfig, prompts: list[Prompt]) -> None:
    """GKD's dataset share needs completions in the dataset."""
    if config.algorithm == "gkd" and config.gkd.lmbda < 1 and config.steps > 0:
        missing = sum(prompt.completion_ids is None for prompt in prompts)
        if missing:
            raise ValueError(
                f"gkd.lmbda={config.gkd.lmbda} trains on dataset completions, but {missing} of {len(prompts)} prompts "
                "have none; name a completion column (prompts.completion_column), or set gkd.lmbda: 1"
            )


def check_disk(directory: Path, needed: int) -> None:
    """Room for the run's checkpoints, bytes."""
    existing = next(parent for parent in [directory, *directory.resolve().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"'{existing}' has {free / 2**30:.1f} GiB free and the run's checkpoints need about {needed / 2**30:.1f}; "
            "free some space, lower checkpoint.keep, or choose another --output_dir"
        )


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """A run is continued with the settings it was started with; only how it is watched and saved may change."""
    free = ("logging", "checkpoint", "rollouts.parity_bound", "rollouts.max_num_seqs", "health.warn_")
    before, now = flatten(saved), flatten(current)
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and not k.startswith(free)]
    if changed:
        listed = "; ".join(f"{k}: {before.get(k)} then, {now.get(k)} now" for k in changed[:8])
        raise ValueError(
            f"--resume with other settings than the run's config.yaml: {listed}. Restore them, or start a new --name"
        )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
