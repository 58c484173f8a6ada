"""Sums over rows of probabilities that an audit takes of every token: compiled on a CPU, torch elsewhere.

On a CPU torch writes every intermediate [n, V] to memory; these were half of an audit's time. Shape legend: n rows, V
vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Of p^e / sum p^e, the law at temperature 1/e times p's. Sixteenths, so that four square roots and a few products give
# all powers at once. A finer grid near 1 costs prior weight and gains little: bets on near temperatures win together.
EXPONENTS = (4.0, 2.0, 1.5, 1.25, 1.125, 1.0625, 0.9375, 0.875, 0.75, 0.625, 0.5, 0.25, 0.0625)


def power_sums(p: Tensor) -> Tensor:
    """[n, V] probabilities -> [n, F] the sum of p^e over the row for each of :data:`EXPONENTS`; 0^e is 0."""
    if p.device.type != "cpu":
        return torch.stack([p.pow(e).sum(-1) for e in EXPONENTS], -1)
    from spec.audit import sums_numba  # here: importing numba takes longer than the rest of the package

    out = np.empty((len(p), len(EXPONENTS)))
    sums_numba.power_sums(p.contiguous().numpy(), out)
    return torch.from_numpy(out).to(p.dtype)


def mass_ahead(p: Tensor, order: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row's token: [n] mass of the tokens whose ``order`` [n, V] is higher, and [n] of those level with it."""
    if p.device.type != "cpu":
        here = order.gather(-1, tokens[:, None])
        return torch.where(order > here, p, 0.0).sum(-1), torch.where(order == here, p, 0.0).sum(-1)
    from spec.audit import sums_numba

    out = np.empty((2, len(p)))
    sums_numba.mass_ahead(p.contiguous().numpy(), order.contiguous().numpy(), tokens.numpy(), out)
    ahead, level = torch.from_numpy(out).to(p.dtype)
    return ahead, level
