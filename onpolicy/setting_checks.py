"""Settings that cannot work, or would do nothing: found without touching a file. ValueErrors name the remedy."""

from __future__ import annotations

from dataclasses import asdict
from operator import attrgetter

from onpolicy.config import StudentConfig, TrainConfig
from onpolicy.health_config import check_health
from onpolicy.types import SamplingParams

_POSITIVE = (
    "prompts_per_step", "sampling.max_tokens", "sampling.samples_per_prompt", "batching.token_budget",
    "optim.updates_per_step", "optim.learning_rate", "optim.max_grad_norm", "checkpoint.every", "checkpoint.keep",
    "rollouts.max_num_seqs", "rollouts.parity_bound", "warm_start.epochs", "warm_start.samples_per_prompt",
    "warm_start.rollouts_per_step", "warm_start.learning_rate", "evaluation.max_tokens", "teacher.weight",
    "student.lora.alpha",
)  # fmt: skip
_NOT_NEGATIVE = (
    "steps", "warm_start.num_prompts", "evaluation.num_prompts", "student.lora.rank", "student.draft_vocabulary",
    "optim.warmup_steps", "optim.weight_decay",
)  # fmt: skip
_SHARES = ("gkd.beta", "gkd.lmbda", "optim.final_scale")


def check_settings(config: TrainConfig) -> None:
    """Values and combinations that cannot work."""
    _check_ranges(config)
    _check_sampling(config)
    _check_divergences(config)
    _check_trackers(config.logging.trackers)
    check_health(config.health, config.sampling.max_tokens)
    if config.steps == 0 and config.warm_start.num_prompts == 0:
        raise ValueError("steps: 0 and warm_start.num_prompts: 0 leave nothing to do; set one of them")
    if config.evaluation.num_prompts > config.prompts.heldout_size:
        raise ValueError(
            f"evaluation.num_prompts is {config.evaluation.num_prompts} but only prompts.heldout_size="
            f"{config.prompts.heldout_size} prompts are held out; lower the first or raise the second"
        )


def _check_ranges(config: TrainConfig) -> None:
    # Written so that NaN, of which no comparison is true, is refused too.
    for name in _POSITIVE:
        if not (value := attrgetter(name)(config)) > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in _NOT_NEGATIVE:
        if not (value := attrgetter(name)(config)) >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    for name in _SHARES:
        if not 0 <= (value := attrgetter(name)(config)) <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"optim.betas must be in [0, 1), got {config.optim.betas}")
    if config.rollouts.kv_cache_gib is not None and not config.rollouts.kv_cache_gib > 0:
        raise ValueError(f"rollouts.kv_cache_gib must be positive, got {config.rollouts.kv_cache_gib}; or leave it out")
    for index, teacher in enumerate(config.other_teachers):
        if not teacher.weight > 0:
            raise ValueError(f"other_teachers[{index}].weight must be positive, got {teacher.weight}; or remove it")


def _check_sampling(config: TrainConfig) -> None:
    sampling = config.sampling
    try:
        SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k)
    except ValueError as error:
        raise ValueError(f"sampling.{error}") from error


def _check_divergences(config: TrainConfig) -> None:
    from onpolicy.losses import names

    for option, divergence in (("gkd", config.gkd.divergence), ("warm_start", config.warm_start.divergence)):
        if divergence not in names():
            raise ValueError(f"{option}.divergence: '{divergence}' is not known; choose one of {', '.join(names())}")


def _check_trackers(trackers: list[str]) -> None:
    """accelerate refuses an unknown tracker late, and passes over one that is not installed in silence."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = list(LOGGER_TYPE_TO_CLASS), [str(tracker) for tracker in get_available_trackers()]
    for tracker in trackers:
        if tracker not in known:
            raise ValueError(f"logging.trackers: '{tracker}' is not known; choose of {', '.join(known)}, or set []")
        if tracker not in installed:
            raise ValueError(f"logging.trackers: '{tracker}' is not installed; install its package, or leave it out")


def ignored_settings(config: TrainConfig) -> list[str]:
    """A sentence for each setting that was changed from its default and has no effect beside the others."""
    student, default, notes = config.student, StudentConfig(), []
    changed = [name for name in ("num_layers", "layers") if getattr(student, name) != getattr(default, name)]
    if student.model is not None and changed:
        names = " and ".join(f"student.{name}" for name in changed)
        notes.append(f"{names}: no effect on student.model, whose layers are all kept (only a teacher is pruned)")
    if student.freeze_embeddings and student.lora.rank > 0:
        notes.append("student.freeze_embeddings: no effect with student.lora.rank, where only the adapter is trained")
    if student.lora.rank == 0 and asdict(student.lora) != asdict(default.lora):
        notes.append("student.lora: no effect with student.lora.rank: 0")
    other = "policy_gradient" if config.algorithm == "gkd" else "gkd"
    if config.steps and getattr(config, other) != getattr(TrainConfig(), other):
        notes.append(f"{other}: these settings have no effect with algorithm: {config.algorithm}")
    return notes
