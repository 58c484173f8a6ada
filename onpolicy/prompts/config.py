"""Settings of the ``prompts`` section."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

WORD_PROBLEMS = "word_problems"  # the built-in source
DEFAULT_WORD_PROBLEMS = 4096  # how many it makes when ``size`` is not set


@dataclass
class SourceConfig:
    """Where rows come from and which of their columns mean what."""

    source: str = WORD_PROBLEMS
    """"word_problems" (built in), a local .jsonl, .json or .parquet file or a folder of them, or a Hugging Face
    datasets id. A local path is never looked up on a hub."""
    subset: str | None = None
    """Configuration of a hub dataset, or sub-folder of a local folder."""
    split: str | None = None
    """Split of a hub dataset or of a local folder; unset means "train"."""
    messages_column: str | None = None
    """Column of conversations; a closing assistant message is the row's completion. Found by itself when it is
    named "messages" or "conversations"."""
    prompt_column: str | None = None
    """Column of prompts: text, a list of messages, or a list of turns of which the first is asked. Found by itself
    when it is named "prompt", "question", "problem", "query", "turns" or "text"."""
    completion_column: str | None = None
    """Column of reference completions, for updates that mix in dataset text. Found by itself when it is named
    "completion" or "response"; without one, the answer column's text serves."""
    answer_column: str | None = None
    """Column of checkable answers ("... #### 42" is read as 42). Found by itself when it is named "answer"."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError(f"prompts.source is empty: name a file, a folder, a dataset id or {WORD_PROBLEMS!r}")
        if self.messages_column and self.prompt_column:
            raise ValueError("prompts.messages_column and prompts.prompt_column exclude each other: set one of them")


@dataclass
class WeightedSource(SourceConfig):
    """One source of a mixture."""

    weight: float = 1.0
    """Share of the training prompts, relative to the other sources' weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weight > 0:
            raise ValueError(f"weight of prompts.mixture source {self.source!r} must be above 0, got {self.weight}")


@dataclass
class PromptsConfig(SourceConfig):
    """Which prompts to train on, which to hold out, and how they become tokens."""

    mixture: list[WeightedSource] = field(default_factory=list)
    """Several sources in place of ``source``; needs ``size``, which the weights divide."""
    size: int | None = None
    """Training prompts to take; unset takes all there are (of the built-in source: 4,096)."""
    heldout_size: int = 256
    """Prompts to hold out; 0 holds out none."""
    heldout_source: str | None = None
    """Source of the held-out prompts; unset carves them out of the training source by content hash."""
    heldout_subset: str | None = None
    """As ``subset``, for the held-out prompts."""
    heldout_split: str | None = None
    """As ``split``, for the held-out prompts; set alone, it is another split of ``source``."""
    system: str | None = None
    """System message put before every prompt that has none; unset leaves the chat template's own default."""
    template: Literal["chat", "plain"] = "chat"
    """"chat" applies the tokenizer's chat template; "plain" feeds the text as it is, for base models."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    max_prompt_tokens: int = 512
    """Longest prompt allowed, template included."""
    too_long: Literal["error", "drop"] = "error"
    """What to do with a longer prompt."""
    shuffle: bool = True
    """Visit prompts in a new random order every epoch; off keeps the source's order."""
    seed: int = 0
    """Seed of the built-in source, of the choice of ``size`` prompts and of their order. Held-out prompts do not
    depend on it, so that runs with different seeds are compared on the same ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.size < 1:
            raise ValueError(f"prompts.size must be at least 1, got {self.size}; leave it unset for all prompts")
        if self.heldout_size < 0:
            raise ValueError(f"prompts.heldout_size must be 0 or more, got {self.heldout_size}")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"prompts.max_prompt_tokens must be at least 1, got {self.max_prompt_tokens}")
        if self.heldout_subset and not (self.heldout_source or self.heldout_split):
            raise ValueError("prompts.heldout_subset needs prompts.heldout_source or prompts.heldout_split beside it")
        if self.template == "plain" and self.chat_template:
            raise ValueError("prompts.chat_template has no effect with template: plain; remove one of the two")
        if self.mixture:
            self._check_mixture()

    def _check_mixture(self) -> None:
        if plain_source(self) != SourceConfig():
            raise ValueError("prompts.mixture replaces prompts.source: move source, split and columns into its entries")
        if self.size is None:
            raise ValueError("prompts.mixture needs prompts.size, the number of prompts that the weights divide")
        if self.heldout_split and not self.heldout_source:
            raise ValueError("prompts.heldout_split with a mixture needs prompts.heldout_source beside it")

    def sources(self) -> list[WeightedSource]:
        """The training sources: those of the mixture, or the only one with weight 1."""
        return list(self.mixture) or [WeightedSource(**vars(plain_source(self)))]

    def heldout(self) -> SourceConfig | None:
        """The held-out prompts' own source (columns as for training), or None when they are carved out."""
        if self.heldout_source:
            return replace(
                plain_source(self), source=self.heldout_source, subset=self.heldout_subset, split=self.heldout_split
            )
        if self.heldout_split:
            return replace(plain_source(self), subset=self.heldout_subset or self.subset, split=self.heldout_split)
        return None


def plain_source(config: SourceConfig) -> SourceConfig:
    """The fields of ``config`` that describe a source, and no others."""
    return SourceConfig(**{name: getattr(config, name) for name in SourceConfig.__dataclass_fields__})
