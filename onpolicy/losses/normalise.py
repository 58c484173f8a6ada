"""From per-token losses to one number, the same however a batch is cut into micro-batches and processes.

N tokens of a flat batch, B sequences.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onpolicy.losses.segments import is_last, segment_sums

Normalisation = Literal["token", "sequence"]


def batch_count(sequence_ids: Tensor, mask: Tensor, normalisation: Normalisation) -> Tensor:
    """Scalar int64: unmasked tokens, or sequences that have any. Its sum over all parts is the ``denominator``."""
    return mask.sum() if normalisation == "token" else is_last(sequence_ids, mask).sum()


def normalised_sum(
    losses: Tensor,
    sequence_ids: Tensor,
    mask: Tensor,
    normalisation: Normalisation,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Scalar: Σ losses / tokens, or Σ over sequences of their mean loss / sequences, over unmasked tokens.

    Sequences must not be split between calls. A framework that averages gradients over P processes (DDP) needs the
    result times P.
    """
    if denominator is None:
        denominator = batch_count(sequence_ids, mask, normalisation).clamp(min=1)
    losses = torch.where(mask, losses, 0.0)
    if normalisation == "sequence" and len(losses):
        lengths = segment_sums(mask.to(losses.dtype), sequence_ids, int(sequence_ids[-1]) + 1)
        losses = losses / lengths.clamp(min=1)[sequence_ids]
    return losses.sum() / denominator
