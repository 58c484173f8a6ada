"""What is known of a configuration before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from onpolicy import checks
from onpolicy.config import TrainConfig
from onpolicy.models import load_tokenizer
from onpolicy.prepare import Prepared, check_engine, plain
from onpolicy.prompts import end_of_turn_id, load_prompts
from onpolicy.updates import make_update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Survey:
    """A configuration without users' mistakes, and what is known before a model is loaded."""

    prepared: Prepared
    student_tokenizer: PreTrainedTokenizerBase | None  # None: pruned from the teacher
    teacher_rows: int
    student_rows: int
    prompt_limit: int

    @property
    def config(self) -> TrainConfig:
        return self.prepared.config

    @property
    def used_ids(self) -> int:
        return max(self.prepared.tokenizer.get_vocab().values()) + 1


def survey(config: TrainConfig, resume: bool) -> Survey:
    """As :func:`onpolicy.prepare.prepare`, but what can be examined is left to the examination.

    Raises ValueError or FileNotFoundError for a user's mistake.
    """
    directory = Path(config.output_dir) / config.name
    checks.check_settings(config)
    make_update(config)
    saved = directory / "config.yaml"
    if resume and saved.exists():
        checks.check_same_config(yaml.safe_load(saved.read_text()), plain(config))
    check_engine(config)
    of_teacher, of_student = checks.check_models(config)
    tokenizer = load_tokenizer(config.teacher.model)
    own = load_tokenizer(config.student.model) if config.student.model is not None else None
    context = min(c.max_position_embeddings for c in (of_teacher, of_student or of_teacher))
    limit = context - max(config.sampling.max_tokens, config.evaluation.max_tokens)
    train, heldout = load_prompts(config.prompts, tokenizer, model_limit=limit)
    checks.check_completions(config, train)
    stops = {end_of_turn_id(tokenizer, config.prompts.template), tokenizer.eos_token_id} - {None}
    prepared = Prepared(config, directory, resume, tokenizer, train, heldout, tuple(sorted(stops)))
    rows = of_teacher.vocab_size
    return Survey(
        prepared, own, rows, of_student.vocab_size if of_student else rows, min(limit, config.prompts.max_prompt_tokens)
    )
