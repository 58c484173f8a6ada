"""Correcting for a sampler that is not quite the trainer.

Kernels, precision and staleness make the policy that drew a token (the sampler) differ from the one being updated
(the trainer), even with equal weights. ρ = exp(trainer - sampler) reweights the samples; tokens that no sampler drew
(NaN log-probs: dataset text) have ρ = 1. N tokens of a flat batch, B sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onpolicy.losses.segments import prefix_sums, segment_sums

RatioLevel = Literal["token", "prefix", "sequence"]
Correction = Literal["none", "truncate", "mask", "clip"]

MAX_LOG_RATIO = 20.0  # exp(20) is finite in every dtype we use, and far beyond any useful weight


def importance_ratios(
    student_logprobs: Tensor,
    sampler_logprobs: Tensor,
    sequence_ids: Tensor,
    mask: Tensor,
    level: RatioLevel = "token",
) -> Tensor:
    """[N] ρ, detached: what makes an average over the sampler's tokens one over the trainer's.

    ``level`` says how much of the sample is reweighted:

    - ``token``: y_t given its prefix; the prefixes stay distributed as the sampler draws them;
    - ``prefix``: y_1..y_t, exact for per-token objectives (discount 0);
    - ``sequence``: all of y, exact for every objective and of the highest variance.

    Masked tokens count as ρ = 1. Log-ratios are bounded to ±20, so ρ is finite.
    """
    drawn = mask & ~sampler_logprobs.isnan()
    log_ratios = torch.where(drawn, (student_logprobs - sampler_logprobs).detach(), 0.0)
    if level == "prefix":
        log_ratios = prefix_sums(log_ratios, sequence_ids)
    elif level == "sequence":
        count = int(sequence_ids[-1]) + 1 if len(sequence_ids) else 0
        log_ratios = segment_sums(log_ratios, sequence_ids, count)[sequence_ids]
    elif level != "token":
        raise ValueError(f"ratio level must be token, prefix or sequence, got {level!r}")
    return log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def truncate_ratios(ratios: Tensor, cap: float) -> Tensor:
    """[N] min(ρ, cap): truncated importance sampling (TIS; Ionides 2008)."""
    return ratios.clamp(max=cap)


def mask_ratios(ratios: Tensor, low: float, high: float) -> Tensor:
    """[N] ρ where low <= ρ <= high, else 0: such tokens are left out (IcePop, arXiv 2510.18855)."""
    return torch.where((ratios >= low) & (ratios <= high), ratios, 0.0)


def clipped_surrogate(
    student_logprobs: Tensor, ratios: Tensor, advantages: Tensor, below: float, above: float
) -> Tensor:
    """[N] -min(ρ A, clip(ρ, 1-below, 1+above) A), with gradient through ρ (PPO, arXiv 1707.06347).

    ρ's value is ``ratios``, its gradient ρ ∇log S(y_t): at level sequence this is GSPO's token form.
    """
    ratios = ratios * (student_logprobs - student_logprobs.detach()).exp()
    return -torch.minimum(ratios * advantages, ratios.clamp(1 - below, 1 + above) * advantages)


def ratio_metrics(ratios: Tensor, weights: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Over unmasked tokens: mean and largest ρ, share of tokens whose weight differs from ρ, effective sample size.

    The effective sample size (Kish), (Σρ)² / (n Σρ²), is 1 where all tokens count alike and 1/n where one rules.
    """
    kept = torch.where(mask, ratios, 0.0)
    count = mask.sum().clamp(min=1)
    return {
        "ratio/mean": kept.sum() / count,
        "ratio/max": kept.max() if len(kept) else kept.sum(),
        "ratio/ess": kept.sum().square() / (count * kept.square().sum()).clamp(min=torch.finfo(kept.dtype).tiny),
        "ratio/changed": (mask & (weights != ratios)).sum() / count,
    }
