"""Sums within the sequences of a flat, ragged batch, without padding.

A batch is flat: its N completion tokens lie one after another, and ``sequence_ids`` [N] int64, non-decreasing, says
which of the B sequences a token belongs to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values: Tensor, sequence_ids: Tensor, count: int) -> Tensor:
    """[B] sums of ``values`` [N] over each of ``count`` sequences; a sequence without tokens sums to 0."""
    return values.new_zeros(count).index_add(0, sequence_ids, values)


def suffix_sums(values: Tensor, sequence_ids: Tensor, discount: float = 1.0) -> Tensor:
    """[N] sum over k >= t of discount^(k-t) values_k, within t's own sequence.

    Doubles the window until it covers the longest sequence, so log2(L) vector operations and no division by powers
    of the discount, which would overflow on long completions.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount must be in [0, 1], got {discount}")
    sums, step = values, 1
    while step < len(values) and discount > 0:
        same_sequence = sequence_ids[step:] == sequence_ids[:-step]
        if not bool(same_sequence.any()):
            break
        later = torch.where(same_sequence, sums[step:], 0.0)
        sums = torch.cat((sums[:-step] + discount**step * later, sums[-step:]))
        step *= 2
    return sums


def prefix_sums(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """[N] sum over k <= t of values_k, within t's own sequence."""
    return suffix_sums(values.flip(0), sequence_ids.flip(0)).flip(0)


def is_last(sequence_ids: Tensor, mask: Tensor) -> Tensor:
    """[N] bool: the last token of its sequence that ``mask`` [N] keeps. A sequence wholly masked has none."""
    kept = mask.to(torch.int64)
    return mask & (suffix_sums(kept, sequence_ids) == 1)
