"""Which tokens min-p, top-k and top-p keep, as one floor on the logits of each row.

All three keep an up-set of the logits, so one number a row says it all: a token is kept iff its logit is at least
the floor. ``torch`` sorts the row and is the reference; ``numba``, without sorting, is
:mod:`spec.sampling_numba`.

Shape legend: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "numba"]


def kept_floor(
    scaled: Tensor,
    top_k: float | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    backend: Backend = "auto",
) -> Tensor | None:
    """The lowest logit kept in each row, [*], or None where nothing is filtered.

    Args:
        scaled: [*, V] logits after temperature, float32 or float64, no NaN.
        top_k: 0, -1 or >= V keeps all. top_p: 1 keeps all. min_p: 0 keeps all. Numbers or tensors of shape [*].

    The rules are in :mod:`spec.sampling`; masses are summed in float64. Raises ValueError outside the ranges.
    """
    _check_ranges(top_k, top_p, min_p)
    numbers = not any(isinstance(value, Tensor) for value in (top_k, top_p, min_p))
    if numbers and top_k <= 0 and top_p >= 1 and min_p <= 0:
        return None
    k = torch.as_tensor(top_k, device=scaled.device)
    # The smallest shares are 0 in float32, and a nucleus of 0 would be the whole vocabulary.
    p, m = (torch.as_tensor(value, dtype=torch.float64, device=scaled.device) for value in (top_p, min_p))
    rows, vocabulary = scaled.shape[:-1], scaled.shape[-1]
    flat = scaled.reshape(-1, vocabulary)
    keep_k = torch.where((k <= 0) | (k > vocabulary), vocabulary, k).long().expand(rows).reshape(-1)
    keep_p, keep_m = (value.expand(rows).reshape(-1) for value in (p, m))
    weights = (flat - flat.amax(-1, keepdim=True)).exp_()  # relative to the most probable token
    if backend == "numba" or (backend == "auto" and scaled.device.type == "cpu"):
        floor = torch.empty(len(flat), dtype=scaled.dtype)
        from spec.sampling_numba import floors  # here: importing numba takes longer than the rest of the package

        floors(*(tensor.contiguous().numpy() for tensor in (flat, weights, keep_k, keep_p, keep_m)), floor.numpy())
    else:
        floor = _floor_by_sorting(flat, weights, keep_k, keep_p, keep_m)
    return floor.reshape(rows)


def drop_below(scaled: Tensor, floor: Tensor) -> Tensor:
    """[*, V] with -inf below each row's floor [*]. Differentiable; the kept set is a constant."""
    if scaled.device.type != "cpu" or (scaled.requires_grad and torch.is_grad_enabled()):
        return scaled.masked_fill(scaled.detach() < floor[..., None], -torch.inf)
    from spec import sampling_numba

    out = torch.empty_like(scaled, memory_format=torch.contiguous_format)
    flat = (
        tensor.detach().contiguous().numpy() for tensor in (scaled.reshape(-1, scaled.shape[-1]), floor.reshape(-1))
    )
    sampling_numba.drop_below(*flat, out.view(-1, scaled.shape[-1]).numpy())
    return out


def _check_ranges(top_k: Any, top_p: Any, min_p: Any) -> None:
    """Numbers only: tensors come from validated requests, and looking into them would wait for the device."""
    if not isinstance(top_k, Tensor) and top_k < -1:
        raise ValueError(f"top_k={top_k}: must be positive, or 0 to keep the whole vocabulary")
    if not isinstance(top_p, Tensor) and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1]; use 1 to switch it off, temperature=0 for greedy")
    if not isinstance(min_p, Tensor) and not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p}: must be in [0, 1]; use 0 to switch it off")


def _floor_by_sorting(flat: Tensor, weights: Tensor, k: Tensor, p: Tensor, m: Tensor) -> Tensor:
    """Reference: [N, V] logits and weights, [N] parameters -> [N] floors."""
    ordered, order = flat.sort(-1, descending=True)
    mass = weights.gather(-1, order).double()
    kept = (mass >= m[:, None]) & (ordered >= ordered.gather(-1, k[:, None] - 1))
    mass = torch.where(kept, mass, 0.0)
    before = mass.cumsum(-1) - mass  # of tokens sorted earlier
    first = torch.ones_like(kept)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    above = torch.where(first, before, 0.0).cummax(-1).values  # of strictly more probable tokens
    kept &= (above < p[:, None] * mass.sum(-1, keepdim=True)) | (p[:, None] >= 1)
    return torch.where(kept, ordered, torch.inf).amin(-1)
