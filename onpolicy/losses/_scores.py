"""Closed-form derivatives of every divergence, in torch: what the chunked loss uses on CUDA, in float64 and for top-k.

A divergence L is a function of the student's log-probabilities lp. Its *score* is c_v = dL / d lp_v, all lp taken as
independent; through the softmax at temperature T the gradient by the logits is (c_v - p_v sum_u c_u) / T. The scores
below are derived by hand from the definitions in :mod:`onpolicy.losses.divergences` and tested against autograd.

Shape legend: n tokens of a chunk, V outcomes (the vocabulary, or K + 1 when truncated).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from onpolicy.losses.divergences import head_weight, without_dead
from onpolicy.losses.truncated import Support, coarsen, support_ids

ValueAndScore = tuple[Tensor, Tensor]  # [n], [n, V]


def _gap(weight: Tensor, la: Tensor, lb: Tensor) -> Tensor:
    """weight (la - lb), 0 where the weight is 0. [n, V]"""
    return torch.where(weight == 0, 0, weight * (la - lb))


def _forward_kl(lp: Tensor, lq: Tensor) -> ValueAndScore:
    q = lq.exp()
    return _gap(q, lq, lp).sum(-1), -q


def _reverse_kl(lp: Tensor, lq: Tensor) -> ValueAndScore:
    p = lp.exp()
    gap = _gap(p, lp, lq)
    return gap.sum(-1), gap + p


def _jsd(lp: Tensor, lq: Tensor, *, beta: float) -> ValueAndScore:
    if beta == 0:
        return _forward_kl(lp, lq)
    if beta == 1:
        return _reverse_kl(lp, lq)
    lm = torch.logaddexp(lq + math.log(beta), lp + math.log1p(-beta))
    student = (1 - beta) * _gap(lp.exp(), lp, lm)
    return (beta * _gap(lq.exp(), lq, lm) + student).sum(-1), student


def _total_variation(lp: Tensor, lq: Tensor) -> ValueAndScore:
    p, q = lp.exp(), lq.exp()
    diff = p - q
    return 0.5 * diff.abs().sum(-1), 0.5 * p * diff.sign()


def _skew_forward_kl(lp: Tensor, lq: Tensor, *, skew: float) -> ValueAndScore:
    if skew == 0:
        return _forward_kl(lp, lq)
    q = lq.exp()
    lm = torch.logaddexp(lq + math.log(skew), lp + math.log1p(-skew))
    return _gap(q, lq, lm).sum(-1), -(1 - skew) * q * (lp - lm).exp()


def _skew_reverse_kl(lp: Tensor, lq: Tensor, *, skew: float) -> ValueAndScore:
    if skew == 0:
        return _reverse_kl(lp, lq)
    p = lp.exp()
    lm = torch.logaddexp(lp + math.log(skew), lq + math.log1p(-skew))
    gap = _gap(p, lp, lm)
    return gap.sum(-1), gap + p * (1 - skew * (lp - lm).exp())


def _adaptive_kl(lp: Tensor, lq: Tensor, *, head_mass: float) -> ValueAndScore:
    w = head_weight(lp, lq, head_mass)
    return _mixed(w, _forward_kl(lp, lq), _reverse_kl(lp, lq))


def _lk_alpha(lp: Tensor, lq: Tensor) -> ValueAndScore:
    log_alpha = torch.minimum(lp, lq).logsumexp(-1)
    # The minimum passes its gradient to the smaller side, half to each at a tie, as torch.minimum does.
    share = torch.where(lp < lq, 1.0, torch.where(lp == lq, 0.5, 0.0)).to(lp.dtype)
    score = torch.where(share == 0, 0, -share * (lp - log_alpha.unsqueeze(-1)).exp())
    return -log_alpha, score


def _lk_hybrid(lp: Tensor, lq: Tensor, *, eta: float) -> ValueAndScore:
    tv, tv_score = _total_variation(lp, lq)
    lam = (-eta * (1 - tv)).exp()
    return _mixed(lam, _forward_kl(lp, lq), (tv, tv_score))


def _mixed(w: Tensor, a: ValueAndScore, b: ValueAndScore) -> ValueAndScore:
    """w a + (1 - w) b with 0 * inf = 0."""
    value = torch.where(w == 0, 0, w * a[0]) + torch.where(w == 1, 0, (1 - w) * b[0])
    w = w.unsqueeze(-1)
    return value, torch.where(w == 0, 0, w * a[1]) + torch.where(w == 1, 0, (1 - w) * b[1])


_SCORES: Mapping[str, Callable[..., ValueAndScore]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "total_variation": _total_variation,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "lk_alpha": _lk_alpha,
    "lk_hybrid": _lk_hybrid,
}


def value_and_grad(
    name: str,
    student_logits: Tensor,  # [n, V], float32 or float64, not yet divided by the temperature
    lp: Tensor,  # [n, V] log-probabilities at the temperature
    lq: Tensor,  # [n, V]
    *,
    temperature: float,
    token_ids: Tensor | None,  # [n]
    top_k: int | None,
    support: Support,
    options: Mapping[str, float],
) -> ValueAndScore:
    """Value [n] and gradient by the student's logits [n, V] of a divergence, both in closed form."""
    if name != "kd":
        value, score = _truncatable(name, lp, lq, top_k, support, options)
        return value, _through_softmax(lp, score) / temperature
    assert token_ids is not None
    alpha = options["alpha"]
    soft, score = _truncatable("forward_kl", lp, lq, top_k, support, {})
    plain = torch.log_softmax(student_logits, -1)
    ids = token_ids.unsqueeze(-1)
    value = (1 - alpha) * temperature**2 * soft - alpha * plain.gather(-1, ids).squeeze(-1)
    hard = plain.exp().scatter_add(-1, ids, -torch.ones_like(ids, dtype=plain.dtype))
    return value, (1 - alpha) * temperature * _through_softmax(lp, score) + alpha * hard


def _through_softmax(lp: Tensor, score: Tensor) -> Tensor:
    return score - lp.exp() * score.sum(-1, keepdim=True)


def _truncatable(
    name: str, lp: Tensor, lq: Tensor, top_k: int | None, support: Support, options: Mapping[str, float]
) -> ValueAndScore:
    """Value [n] and score [n, V]; a truncated divergence's score is spread over the vocabulary."""
    if top_k is None:
        return _SCORES[name](*without_dead(lp, lq), **options)
    ids = support_ids(lp, lq, top_k, support)
    coarse_p, coarse_q = coarsen(lp, lq, top_k, support)
    value, coarse = _SCORES[name](*without_dead(coarse_p, coarse_q), **options)
    inside, tail = coarse[..., : ids.shape[-1]], coarse[..., ids.shape[-1] :]
    if not tail.shape[-1]:
        return value, torch.zeros_like(lp).scatter(-1, ids, inside)
    # d log(tail) / d lp_v is the token's share of the tail's mass; no share of an impossible tail.
    mass = coarse_p[..., -1:]
    shares = (lp - mass.masked_fill(torch.isneginf(mass), 0)).exp()
    return value, (tail * shares).scatter(-1, ids, inside)
