"""What is handed from stage to stage.

Shape legend, used everywhere in ``onpolicy``: B rollouts, R packed rows, L positions of a row,
N completion tokens of a batch, V vocabulary, D hidden size.

Plain Python and numpy, so that importing it is cheap and a rollout can cross a process boundary; tensors begin with
:class:`onpolicy.batching.Batch` and :class:`onpolicy.teachers.Score`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length"]
Source = Literal["student", "teacher", "dataset"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, chat-templated and tokenised."""

    id: str  # stable across runs: a content hash, e.g. "3f9a61c0d2b7"
    token_ids: tuple[int, ...]  # with the template's generation prompt at the end
    answer: str | None = None  # checkable final answer, e.g. "42"
    completion_ids: tuple[int, ...] | None = None  # the dataset's own completion, end token included


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. The same processed distribution is meant by every engine."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # in (0, 1]
    top_k: int = 0  # 0 keeps the whole vocabulary
    max_tokens: int = 96  # completion tokens, the stop token included
    n: int = 1  # completions a prompt
    seed: int = 0  # with prompt id and sample index it fixes each completion
    stop_token_ids: tuple[int, ...] = ()  # the completion ends with one of them, which is kept

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 keeps the whole vocabulary), got {self.top_k}")
        if self.max_tokens < 1 or self.n < 1:
            raise ValueError(f"max_tokens and n must be at least 1, got {self.max_tokens} and {self.n}")


@dataclass(frozen=True)
class Rollout:
    """One completion of one prompt, as its sampler drew it."""

    prompt: Prompt
    completion_ids: np.ndarray  # [L] int64, the stop token included when finish_reason is "stop"
    logprobs: (
        np.ndarray
    )  # [L] float32, the sampler's own, of the *processed* distribution, nats; NaN for text no sampler drew
    finish_reason: FinishReason
    policy_version: int  # updates the drawing policy had seen
    sample_index: int = 0  # which of the prompt's n samples
    source: Source = "student"
    task_reward: float | None = None  # of the whole completion as it was drawn, e.g. 1.0; None where none was asked for

    def __len__(self) -> int:
        return len(self.completion_ids)
