"""From per-token rewards to what each token's log-prob is multiplied with.

N tokens of a flat batch, B sequences. All tensors here are plain numbers: no gradient flows through an advantage.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onpolicy.losses.segments import is_last, suffix_sums

TaskPlacement = Literal["sequence", "last"]
Whitening = Literal["none", "mean", "mean_std"]


def returns_to_go(
    rewards: Tensor, sequence_ids: Tensor, discount: float = 0.0, expected_future: Tensor | None = None
) -> Tensor:
    """[N] r_t + Σ_{k>t} discount^(k-t) r_k within each sequence.

    discount 0 credits a token with its own reward alone: the gradient of per-token KL at prefixes taken as given.
    discount 1 also credits it with where it leads: the gradient of the sequences' KL.
    ``expected_future`` [N] (closed-form expected rewards at each prefix) replaces the sampled r_k of later tokens:
    same expectation, less variance (Rao-Blackwell).
    """
    if expected_future is None:
        return suffix_sums(rewards, sequence_ids, discount)
    return rewards + suffix_sums(expected_future, sequence_ids, discount) - expected_future


def task_credit(
    task_rewards: Tensor, sequence_ids: Tensor, mask: Tensor, placement: TaskPlacement = "sequence"
) -> Tensor:
    """[N] a verifiable reward per sequence (``task_rewards`` [B]) as credit per token.

    ``sequence``: every token is credited, whatever the teacher reward's discount: the gradient of the mean task
    reward. ``last``: only the last unmasked token, to be added to rewards before :func:`returns_to_go`; with discount
    0 the earlier tokens then learn nothing from the task.
    """
    if len(sequence_ids) and int(sequence_ids[-1]) >= len(task_rewards):
        raise ValueError(f"{len(task_rewards)} task rewards for {int(sequence_ids[-1]) + 1} sequences; give one each")
    credit = task_rewards.detach()[sequence_ids]
    if placement not in ("sequence", "last"):
        raise ValueError(f"task placement must be sequence or last, got {placement!r}")
    return torch.where(mask if placement == "sequence" else is_last(sequence_ids, mask), credit, 0.0)


def moments(values: Tensor, mask: Tensor) -> Tensor:
    """[3] float64: count, sum and sum of squares over unmasked tokens. Add them up over micro-batches and processes."""
    kept = torch.where(mask, values.detach(), 0.0).double()
    return torch.stack((mask.sum().double(), kept.sum(), kept.square().sum()))


def whiten(
    advantages: Tensor, mask: Tensor, how: Whitening = "mean_std", batch_moments: Tensor | None = None
) -> Tensor:
    """[N] advantages less the batch's mean and, for ``mean_std``, divided by its standard deviation.

    ``batch_moments`` [3] are :func:`moments` of the whole batch where this is only part of it; without them each
    micro-batch is whitened by itself and gradients no longer add up to those of one big batch.
    A token is part of the mean it is compared with, so a finite batch shrinks and bends the gradient
    (docs/estimators.md shows by how much). A batch without spread is only centred.
    """
    if how == "none":
        return advantages
    if how not in ("mean", "mean_std"):
        raise ValueError(f"whitening must be none, mean or mean_std, got {how!r}")
    count, total, squares = (moments(advantages, mask) if batch_moments is None else batch_moments).unbind()
    mean = total / count.clamp(min=1)
    centred = advantages - mean.to(advantages.dtype)
    if how == "mean_std":
        variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
        # Below rounding error of the two terms subtracted, a spread is noise: do not blow it up.
        spread = torch.where(variance > 1e-12 * (1 + mean.square()), variance.sqrt(), 1.0)
        centred = centred / spread.to(advantages.dtype)
    return torch.where(mask, centred, 0.0)
