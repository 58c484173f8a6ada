"""Users' mistakes, found before any model is loaded. Every check raises ValueError with the remedy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onpolicy.config import TrainConfig
from onpolicy.models import check_model_exists, loading_options
from onpolicy.student import check_layers, evenly_spaced
from onpolicy.teachers.convert import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from onpolicy.types import Prompt

# What may change on --resume, as prefixes: how a run is watched and saved, and what mends one that diverged.
_FREE = (
    "logging", "checkpoint", "rollouts.parity_bound", "rollouts.max_num_seqs", "health.warn_",
    "optim.learning_rate", "optim.max_grad_norm", "warm_start.learning_rate",
)  # fmt: skip


def check_directory(directory: Path, resume: bool) -> None:
    """Refuse a directory that already holds a run, unless it is to be continued."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"'{directory}' is a file; choose another --name or --output_dir")
    existing = existing_parent(directory)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"'{directory}' cannot be written: '{existing}' takes no files; choose another --output_dir")
    if not resume and directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"'{directory}' already holds a run: continue it with --resume, or choose another --name")


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that there is."""
    return next(parent for parent in [path, *path.resolve().parents] if parent.exists())


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


def check_adapter(targets: list[str] | None, adapted: PretrainedConfig) -> None:
    """Every name in ``student.lora.target_modules`` is that of a module of the model; nothing is loaded."""
    from transformers import AutoModelForCausalLM

    if not targets:
        return
    with torch.device("meta"):
        modules = {name for name, _ in AutoModelForCausalLM.from_config(adapted).named_modules()}
    last = {name.rpartition(".")[2] for name in modules}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            known = ", ".join(sorted(name for name in last if name and not name.isdigit()))
            raise ValueError(f"student.lora.target_modules: no module is called '{target}'; its modules: {known}")


def panel_models(config: TrainConfig) -> dict[str, str]:
    """Models that have a say beside the teacher, by the option that names them."""
    models = {f"other_teachers[{index}].model": other.model for index, other in enumerate(config.other_teachers)}
    reference = config.policy_gradient.reference_model
    if config.algorithm == "policy_gradient" and reference is not None:
        models["policy_gradient.reference_model"] = reference
    return models


def check_panel(config: TrainConfig) -> dict[str, PretrainedConfig]:
    """Configurations of further teachers and of the reference, by their option."""
    return {option: read_model_config(name, option) for option, name in panel_models(config).items()}


def check_panel_tokenizers(
    teacher: PreTrainedTokenizerBase,
    others: dict[str, PreTrainedTokenizerBase],
    rows: dict[str, int],
    config: TrainConfig,
) -> None:
    """Whoever has a say reads the teacher's ids: same tokens, a row for each, the same rendering of a conversation.

    Args:
        others, rows: tokenizer and output rows by the option that names the model. One without a chat template of its
            own is taken to be a base model, which knows no other rendering either.
    """
    used = used_ids(teacher)
    for option, tokenizer in others.items():
        if different := different_tokens(teacher, tokenizer):
            raise ValueError(
                f"{option} has another tokenizer than the first teacher: {len(different)} tokens differ, e.g. "
                f"{different[:5]}. All score the same ids: choose a model of the same family"
            )
        if used > rows[option]:
            raise ValueError(
                f"{option} has {rows[option]} output rows but the tokenizer has ids up to {used - 1}: it cannot score "
                "them all; use a matching checkpoint"
            )
        if tokenizer.chat_template and not same_rendering(teacher, tokenizer, config):
            raise ValueError(
                f"{option} has another chat template than the first teacher: it would score text it never saw in "
                "training. Set prompts.chat_template to the template file that all were trained with"
            )


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
    if different := different_tokens(teacher, student):
        raise ValueError(
            f"teacher and student have different tokenizers: {len(different)} tokens differ, e.g. {different[:5]}. The "
            "teacher scores the student's tokens one by one, so both must share a vocabulary: choose a student of the "
            "teacher's family, or prune one from it (leave student.model unset)"
        )
    used = used_ids(student)
    if used > min(teacher_rows, student_rows):
        raise ValueError(
            f"the tokenizer has ids up to {used - 1} but the teacher has {teacher_rows} output rows and the student "
            f"{student_rows}: a model without a row for every token cannot be scored; use matching checkpoints"
        )


def used_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids the tokenizer has, from 0 to its highest."""
    return max(tokenizer.get_vocab().values()) + 1


def different_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that only one of the two has, or under another id."""
    ours, theirs = first.get_vocab(), second.get_vocab()
    return sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))


def check_same_rendering(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, config: TrainConfig
) -> None:
    """Both chat templates must render alike: a teacher that reads other text scores every token wrongly."""
    if not same_rendering(teacher, student, config):
        raise ValueError(
            "teacher and student have different chat templates: the teacher would score text it never saw in training. "
            "Set prompts.chat_template to the teacher's template file"
        )


def same_rendering(teacher: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, config: TrainConfig) -> bool:
    """Whether both give the same ids for a conversation; True where their own templates are not used."""
    from onpolicy.prompts import render

    if config.prompts.template != "chat" or config.prompts.chat_template or not teacher.chat_template:
        return True
    probe = [{"role": "user", "content": "How many legs have 3 cats?"}]
    return render(teacher, probe) == render(other, probe)


def check_completions(config: TrainConfig, prompts: list[Prompt]) -> None:
    """GKD's dataset share needs completions in the dataset."""
    if config.algorithm == "gkd" and config.gkd.lmbda < 1 and config.steps > 0:
        missing = sum(prompt.completion_ids is None for prompt in prompts)
        if missing:
            raise ValueError(
                f"gkd.lmbda={config.gkd.lmbda} trains on dataset completions, but {missing} of {len(prompts)} prompts "
                "have none; name a completion column (prompts.completion_column), or set gkd.lmbda: 1"
            )


def check_answers(config: TrainConfig, prompts: list[Prompt]) -> None:
    """A task reward needs answers to check against."""
    if config.algorithm == "policy_gradient" and config.policy_gradient.task_weight and config.steps > 0:
        missing = sum(prompt.answer is None for prompt in prompts)
        if missing:
            raise ValueError(
                f"policy_gradient.task_weight={config.policy_gradient.task_weight} rewards right answers, but "
                f"{missing} of {len(prompts)} prompts have none; name an answer column (prompts.answer_column), or set "
                "policy_gradient.task_weight: 0"
            )


def check_disk(directory: Path, needed: int) -> None:
    """Room for the run's checkpoints, bytes."""
    existing = existing_parent(directory)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"'{existing}' has {free / 2**30:.1f} GiB free and the run's checkpoints need about {needed / 2**30:.1f}; "
            "free some space, lower checkpoint.keep, or choose another --output_dir"
        )


def check_same_config(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """A run is continued with the settings it was started with, but for ``_FREE``."""
    before, now = flatten(saved), flatten(current)
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and not k.startswith(_FREE)]
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
