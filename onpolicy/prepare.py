"""From a configuration to a checked run: every mistake that can be found before a model is loaded is found here."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from onpolicy import checks
from onpolicy.config import TrainConfig
from onpolicy.models import load_tokenizer
from onpolicy.processes import is_first, launched
from onpolicy.prompts import check_source, end_of_turn_id, load_prompts
from onpolicy.setting_checks import check_settings
from onpolicy.types import Prompt
from onpolicy.updates import make_update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A checked run: nothing heavy has been loaded yet."""

    config: TrainConfig
    directory: Path
    resume: bool
    tokenizer: PreTrainedTokenizerBase
    train_prompts: list[Prompt]
    heldout_prompts: list[Prompt]
    stop_token_ids: tuple[int, ...]

    @property
    def summary(self) -> Path:
        return self.directory / "summary.json"

    @property
    def used_ids(self) -> int:
        """Ids of the tokenizer: output rows beyond them are padding, of which teacher and student may have other
        numbers; they are never drawn, scored or trained."""
        return checks.used_ids(self.tokenizer)


@dataclass(frozen=True)
class Survey:
    """What is known of a configuration before a model is loaded."""

    prepared: Prepared
    student_tokenizer: PreTrainedTokenizerBase | None  # None: pruned from the teacher
    teacher_rows: int  # of the output matrix
    student_rows: int
    prompt_limit: int  # tokens


def prepare(config: TrainConfig, resume: bool) -> Prepared:
    """Find every mistake that can be found before models are loaded. Raises ValueError or FileNotFoundError."""
    if is_first():  # another process may find what the first has begun to write
        checks.check_directory(run_directory(config), resume)
    seen = survey(config, resume)
    tokenizer, own = seen.prepared.tokenizer, seen.student_tokenizer
    if own is not None:
        checks.check_vocabularies(tokenizer, own, seen.teacher_rows, seen.student_rows)
        checks.check_same_rendering(tokenizer, own, config)
    return seen.prepared


def survey(config: TrainConfig, resume: bool) -> Survey:
    """What training refuses and no examination can make good; teacher and student may still not fit each other.

    Raises ValueError or FileNotFoundError for a user's mistake.
    """
    directory = run_directory(config)
    check_settings(config)
    make_update(config)
    saved = directory / "config.yaml"
    if resume and saved.exists():
        checks.check_same_config(yaml.safe_load(saved.read_text()), plain(config))
    check_engine(config)
    check_source(config.prompts)
    of_teacher, of_student = checks.check_models(config)
    if config.student.lora.rank:
        checks.check_adapter(config.student.lora.target_modules, of_student or of_teacher)
    of_panel = checks.check_panel(config)
    tokenizer = load_tokenizer(config.teacher.model, "teacher.model")
    own = load_tokenizer(config.student.model, "student.model") if config.student.model is not None else None
    panel = {option: load_tokenizer(name, option) for option, name in checks.panel_models(config).items()}
    checks.check_panel_tokenizers(tokenizer, panel, {o: c.vocab_size for o, c in of_panel.items()}, config)
    models = [of_teacher, of_student or of_teacher, *of_panel.values()]
    longest = max(config.sampling.max_tokens, config.evaluation.max_tokens)
    limit = min(model.max_position_embeddings for model in models) - longest
    train, heldout = load_prompts(config.prompts, tokenizer, model_limit=limit)
    checks.check_completions(config, train)
    checks.check_answers(config, train)
    stops = {end_of_turn_id(tokenizer, config.prompts.template), tokenizer.eos_token_id} - {None}
    prepared = Prepared(config, directory, resume, tokenizer, train, heldout, tuple(sorted(stops)))
    rows = of_teacher.vocab_size
    return Survey(
        prepared, own, rows, of_student.vocab_size if of_student else rows, min(limit, config.prompts.max_prompt_tokens)
    )


def run_directory(config: TrainConfig) -> Path:
    return Path(config.output_dir) / config.name


def check_engine(config: TrainConfig) -> None:
    if config.rollouts.engine == "vllm" and not has_vllm():
        raise ValueError(
            "rollouts.engine: vllm, but vLLM is not installed; run `make setup` (CPU), install `vllm` (GPU), or set "
            "rollouts.engine: transformers"
        )
    if config.rollouts.engine == "vllm" and launched() > 1:
        raise ValueError(
            f"rollouts.engine: vllm, in {launched()} processes: the engine in this process would take the other "
            "processes for its own; set rollouts.engine: transformers, or start one process"
        )


def engine_name(config: TrainConfig) -> Literal["vllm", "transformers"]:
    """The engine that samples: the one asked for, or the faster one that works here."""
    if config.rollouts.engine == "auto":
        return "vllm" if has_vllm() and launched() == 1 else "transformers"
    return config.rollouts.engine


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as YAML and JSON know it (tuples become lists)."""
    return yaml.safe_load(yaml.safe_dump(_lists(asdict(config))))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
