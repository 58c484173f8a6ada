"""The eager reference: one request, in the order the papers write it. Float64 throughout.

Shapes: target [K+1, V], draft [K, V] (one-hot rows for deterministic proposals), ids [K].
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec.verify.block import Mode


def dense_draft(ids: Tensor, probs: Tensor | None, rows: Tensor, vocabulary: int) -> Tensor:
    """[K, V] float64 draft rows, one-hot where ``rows`` is -1."""
    draft = torch.nn.functional.one_hot(ids, vocabulary).double()
    if probs is not None:
        known = rows >= 0
        draft[known] = probs[rows[known]].double()
    return draft


def request_laws(target: Tensor, draft: Tensor, ids: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """Acceptance probabilities [K], and [K+1, V] laws of the last token given how many were accepted."""
    weights, accept = [1.0], []
    for i, token in enumerate(ids.tolist()):
        p, q = float(target[i, token]), float(draft[i, token])
        ratio = p / q if q > 0 else float(p > 0)  # q = 0 cannot have been drawn
        weights.append(min(1.0, ratio if mode == "token" else weights[i] * ratio))
    for i in range(1, len(ids) + 1):
        if mode == "token" or i == len(ids):
            accept.append(weights[i])
            continue
        surplus = float((weights[i] * target[i] - draft[i]).clamp(min=0).sum())
        short = surplus + 1 - weights[i]
        accept.append(surplus / short if short > 0 else 1.0)  # 0/0: p = q here, and a longer prefix passes
    if mode == "token":
        weights = [1.0] * len(weights)
    last = [residual(target[i], draft[i], weights[i]) for i in range(len(ids))] + [target[-1] / target[-1].sum()]
    return torch.tensor(accept, dtype=torch.float64), torch.stack(last)


def residual(p: Tensor, q: Tensor, weight: float = 1.0) -> Tensor:
    """norm(max(weight p - q, 0)), [V]; p itself where nothing is left, which only rounding can bring about."""
    excess = (weight * p - q).clamp(min=0)
    total = excess.sum()
    return excess / total if total > 0 else p / p.sum()


def count_accepted(accept: Tensor, uniforms: Tensor, mode: Mode) -> int:
    """tau from acceptance probabilities [K] and uniforms [K]."""
    passes = (uniforms < accept).tolist()
    if mode == "token":
        return passes.index(False) if False in passes else len(passes)
    return max((i + 1 for i, good in enumerate(passes) if good), default=0)


def inverse_cdf(law: Tensor, uniform: float) -> int:
    """The first token whose cumulated mass exceeds ``uniform`` of the total: never one without mass."""
    cdf = law.double().cumsum(0)
    return min(int((cdf <= uniform * cdf[-1]).sum()), int((cdf < cdf[-1]).sum()))
