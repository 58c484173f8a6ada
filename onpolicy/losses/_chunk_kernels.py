"""Value and gradient of one chunk of tokens from its logits: torch here, or the fused CPU kernels where they apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from onpolicy.losses import _fused, _scores
from onpolicy.losses.divergences import log_probs
from onpolicy.losses.truncated import Support


@dataclass(frozen=True)
class Divergence:
    """Which divergence, with every option resolved."""

    name: str
    options: Mapping[str, float]
    temperature: float = 1.0
    top_k: int | None = None
    support: Support = "teacher"


class ChunkResult(NamedTuple):
    """Per-token values of one chunk, float32 (float64). The gradient is left in the student's logits buffer."""

    value: Tensor  # [n]
    entropy: Tensor  # [n], the student's, nats
    student_logprobs: Tensor | None  # [n]
    teacher_logprobs: Tensor | None  # [n]
    rounded: Tensor | None  # [n, V] the gradient in bf16, where it was asked for and the fused kernel ran


def evaluate_chunk(
    what: Divergence,
    student: Tensor,  # [n, V] logits, float32 or float64; overwritten
    teacher: Tensor,  # [n, V] logits; overwritten
    token_ids: Tensor | None,  # [n]
    scale: Tensor | None,  # [n] factor of each token's gradient; None computes no gradient
    rounded: Tensor | None,  # [n, V] bf16 buffer for a copy of the gradient
) -> ChunkResult:
    """Divergence of each token; its gradient by the student's logits, times ``scale``, replaces ``student``."""
    if what.top_k is None and _fused.supports(what.name, student):
        return ChunkResult(
            *_fused.run(what.name, what.options, what.temperature, student, teacher, token_ids, scale, rounded)
        )
    lp, lq = log_probs(student, what.temperature), log_probs(teacher, what.temperature)
    entropy = -torch.where(torch.isneginf(lp), 0, lp.exp() * lp).sum(-1)
    value, grad = _scores.value_and_grad(
        what.name,
        student,
        lp,
        lq,
        temperature=what.temperature,
        token_ids=token_ids,
        top_k=what.top_k,
        support=what.support,
        options=what.options,
    )
    if scale is not None:
        torch.mul(grad, scale.unsqueeze(-1), out=student)
        if rounded is not None:
            rounded.copy_(student)
    return ChunkResult(value, entropy, at_tokens(lp, token_ids), at_tokens(lq, token_ids), rounded)


def at_tokens(logs: Tensor, token_ids: Tensor | None) -> Tensor | None:
    """[n, V] -> [n], or None without ids."""
    return None if token_ids is None else logs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
