"""From a configuration to a checked run: every mistake that can be found before a model is loaded is found here."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from onpolicy import checks
from onpolicy.config import TrainConfig
from onpolicy.models import load_tokenizer
from onpolicy.prompts import check_source, end_of_turn_id, load_prompts
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


def prepare(config: TrainConfig, resume: bool) -> Prepared:
    """Find every mistake that can be found before models are loaded. Raises ValueError or FileNotFoundError."""
    directory = Path(config.output_dir) / config.name
    checks.check_settings(config)
    make_update(config)
    checks.check_directory(directory, resume)
    saved = directory / "config.yaml"
    if resume and saved.exists():
        checks.check_same_config(yaml.safe_load(saved.read_text()), plain(config))
    check_engine(config)
    check_source(config.prompts)
    teacher, student = checks.check_models(config)
    tokenizer = load_tokenizer(config.teacher.model)
    if config.student.model is not None and student is not None:
        own = load_tokenizer(config.student.model)
        checks.check_vocabularies(tokenizer, own, teacher.vocab_size, student.vocab_size)
        checks.check_same_rendering(tokenizer, own, config)
    context = min(c.max_position_embeddings for c in (teacher, student or teacher))
    limit = context - max(config.sampling.max_tokens, config.evaluation.max_tokens)
    train, heldout = load_prompts(config.prompts, tokenizer, model_limit=limit)
    checks.check_completions(config, train)
    stops = {end_of_turn_id(tokenizer, config.prompts.template), tokenizer.eos_token_id} - {None}
    return Prepared(config, directory, resume, tokenizer, train, heldout, tuple(sorted(stops)))


def check_engine(config: TrainConfig) -> None:
    if config.rollouts.engine == "vllm" and not has_vllm():
        raise ValueError(
            "rollouts.engine: vllm, but vLLM is not installed; run `make setup` (CPU), install `vllm` (GPU), or set "
            "rollouts.engine: transformers"
        )


def has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def plain(config: TrainConfig) -> dict[str, Any]:
    """The configuration as YAML and JSON know it (tuples become lists)."""
    return yaml.safe_load(yaml.safe_dump(_lists(asdict(config))))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
