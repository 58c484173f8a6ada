"""Sums over rows of probabilities that an audit takes of every token: compiled on a CPU, torch elsewhere.

On a CPU torch writes every intermediate [n, V] to memory; these were half of an audit's time. Shape legend: n rows, V
vocabulary; p the target's law, q the draft's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Of p^e / sum p^e, the law at temperature 1/e times p's. Sixteenths, so that four square roots and a few products give
# all powers at once. A finer grid near 1 costs prior weight and gains little: bets on near temperatures win together.
EXPONENTS = (4.0, 2.0, 1.5, 1.25, 1.125, 1.0625, 0.9375, 0.875, 0.75, 0.625, 0.5, 0.25, 0.0625)


def _on_cpu(p: Tensor) -> bool:
    return p.device.type == "cpu"


def power_sums(p: Tensor) -> Tensor:
    """[n, V] probabilities -> [n, F] the sum of p^e over the row for each of :data:`EXPONENTS`; 0^e is 0."""
    if not _on_cpu(p):
        return torch.stack([p.pow(e).sum(-1) for e in EXPONENTS], -1)
    return _compiled("power_sums", len(EXPONENTS), p).T


def mass_ahead(p: Tensor, order: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row's token: [n] mass of the tokens whose ``order`` [n, V] is higher, and [n] of those level with it."""
    if not _on_cpu(p):
        here = order.gather(-1, tokens[:, None])
        return torch.where(order > here, p, 0.0).sum(-1), torch.where(order == here, p, 0.0).sum(-1)
    ahead, level = _compiled("mass_ahead", 2, p, order, tokens)
    return ahead, level


def mass_before(p: Tensor, tokens: Tensor) -> Tensor:
    """[n] mass of the tokens with a smaller id than each row's token."""
    if not _on_cpu(p):
        return torch.where(torch.arange(p.shape[-1], device=p.device) < tokens[:, None], p, 0.0).sum(-1)
    return _compiled("mass_before", 1, p, tokens)[0]


def mass_outside(law: Tensor, p: Tensor) -> Tensor:
    """[n] mass that ``law`` [n, V] has where p has none."""
    if not _on_cpu(p):
        return torch.where(p > 0, 0.0, law).sum(-1)
    return _compiled("mass_outside", 1, law, p)[0]


def top_tokens(p: Tensor) -> Tensor:
    """[n] int64 the likeliest token, the lowest id of equals. torch's own argmax is ten times slower on a CPU."""
    if not _on_cpu(p):
        return p.argmax(-1)
    from spec.audit import sums_numba

    out = np.empty(len(p), np.int64)
    sums_numba.top_tokens(p.contiguous().numpy(), out)
    return torch.from_numpy(out)


@dataclass(frozen=True)
class RowSums:
    """Of each row's p, [n] each; surprise is s = -log p, in nats."""

    entropy: Tensor  # H = sum p s
    squares: Tensor  # sum p s^2
    typical: Tensor  # exp(-H): a token with less is more surprising than expected
    surprising: Tensor  # mass of those
    unlikely: Tensor  # mass of those with p < UNLIKELY
    support: Tensor  # number of those with p > 0


UNLIKELY = 0.01


def row_sums(p: Tensor) -> RowSums:
    """Of [n, V] probabilities."""
    surprise = p.clamp_min(torch.finfo(p.dtype).tiny).log_().neg_()  # some logarithms are slow at 0; p keeps it out
    if not _on_cpu(p):
        entropy = (p * surprise).sum(-1)
        typical = entropy.neg().exp()
        surprising, unlikely = (torch.where(p < bound, p, 0.0).sum(-1) for bound in (typical[:, None], UNLIKELY))
        squares, support = (p * surprise.square()).sum(-1), (p > 0).sum(-1).to(p)
        return RowSums(entropy, squares, typical, surprising, unlikely, support)
    return RowSums(*_compiled("row_sums", 6, p, surprise, UNLIKELY))


@dataclass(frozen=True)
class Overlaps:
    """Of each row's p and q, [n] each."""

    liked: Tensor  # p's mass where q > p
    outside: Tensor  # q's mass where p = 0
    residual: Tensor  # sum of max(p - q, 0)
    accepted: tuple[Tensor, ...]  # sum of min(q, f p) for each f of LENIENCE


LENIENCE = (2.0, 0.5)


def overlaps(p: Tensor, q: Tensor) -> Overlaps:
    """Of two laws, [n, V] each."""
    if not _on_cpu(p):
        liked = torch.where(q > p, p, 0.0).sum(-1)
        taken = tuple(torch.minimum(q, f * p).sum(-1) for f in LENIENCE)
        return Overlaps(liked, mass_outside(q, p), (p - q).clamp(min=0).sum(-1), taken)
    liked, outside, residual, lenient, strict = _compiled("overlaps", 5, p, q, *LENIENCE)
    return Overlaps(liked, outside, residual, (lenient, strict))


def _compiled(name: str, sums: int, *arguments: Tensor | float) -> Tensor:
    """[sums, n] of a kernel of :mod:`spec.audit.sums_numba`; the first argument is [n, V]."""
    from spec.audit import sums_numba  # here: importing numba takes longer than the rest of the package

    first = arguments[0]
    assert isinstance(first, Tensor)
    out = np.empty((sums, len(first)))
    exact = np.float64 if first.dtype == torch.float64 else np.float32  # numbers must not widen a row's arithmetic
    given = [each.contiguous().numpy() if isinstance(each, Tensor) else exact(each) for each in arguments]
    getattr(sums_numba, name)(*given, out)
    return torch.from_numpy(out).to(first.dtype)
