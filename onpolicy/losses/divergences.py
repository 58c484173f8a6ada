"""Divergences between a student's and a teacher's next-token distributions: the eager, differentiable definitions.

Every value is per token, in nats, non-negative, and zero when the two distributions are equal (``kd`` adds a
cross-entropy and is zero only in its soft part). These definitions are the reference that the bounded-memory
implementation in :mod:`onpolicy.losses.chunked` is tested against.

Notation: p student, q teacher, both at the temperature given; ``lp`` and ``lq`` their logarithms, -inf where a
vocabulary entry is masked. 0 log 0 is 0 everywhere, so an entry masked in both models changes nothing.
Where one distribution gives no mass to a token that the other can emit, the value is what mathematics says:
forward KL is +inf when the student masks a token the teacher can emit, reverse KL when the teacher masks one the
student can emit, ``lk_alpha`` when the supports are disjoint; a non-finite value has no useful gradient. JSD with
0 < beta < 1, total variation and the skewed divergences stay finite.

Shape legend: ... any leading dimensions, V vocabulary, K support size of a truncated divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from onpolicy.losses._checks import check_mask, check_token_ids, normaliser, required_ids, resolve_options
from onpolicy.losses.truncated import Support, coarsen

DEAD = -1e5  # stands for -inf where both models mask an entry: exp(DEAD) is 0 in float64 too, and differences are 0


def forward_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(q || p) = sum q log(q/p): mode covering. [..., V] log-probabilities -> [...]."""
    return _expected_gap(lq, lq, lp)


def reverse_kl(lp: Tensor, lq: Tensor) -> Tensor:
    """KL(p || q) = sum p log(p/q): mode seeking; the on-policy objective."""
    return _expected_gap(lp, lp, lq)


def jsd(lp: Tensor, lq: Tensor, *, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD (arXiv:2306.13649).

    With m = beta q + (1 - beta) p: beta KL(q || m) + (1 - beta) KL(p || m). The value at the ends is identically 0;
    as GKD does, beta = 0 means forward KL and beta = 1 reverse KL, the limits of JSD / beta and JSD / (1 - beta).
    """
    if beta == 0:
        return forward_kl(lp, lq)
    if beta == 1:
        return reverse_kl(lp, lq)
    lm = _log_mixture(lq, lp, beta)
    return beta * _expected_gap(lq, lq, lm) + (1 - beta) * _expected_gap(lp, lp, lm)


def total_variation(lp: Tensor, lq: Tensor) -> Tensor:
    """TV = 1/2 sum |p - q| = 1 - acceptance of speculative sampling (arXiv:2211.17192)."""
    return 0.5 * (lp.exp() - lq.exp()).abs().sum(-1)


def skew_forward_kl(lp: Tensor, lq: Tensor, *, skew: float) -> Tensor:
    """KL(q || skew q + (1 - skew) p), DistiLLM's skew KL (arXiv:2402.03898). skew = 0 is forward KL."""
    return _expected_gap(lq, lq, _log_mixture(lq, lp, skew) if skew else lp)


def skew_reverse_kl(lp: Tensor, lq: Tensor, *, skew: float) -> Tensor:
    """KL(p || skew p + (1 - skew) q), DistiLLM's skew reverse KL (arXiv:2402.03898). skew = 0 is reverse KL."""
    return _expected_gap(lp, lp, _log_mixture(lp, lq, skew) if skew else lq)


def adaptive_kl(lp: Tensor, lq: Tensor, *, head_mass: float) -> Tensor:
    """w KL(q || p) + (1 - w) KL(p || q), adaptive KL (AKL, arXiv:2404.02657).

    w is the share of the head in sum |p - q|; the head is the smallest set of the teacher's likeliest tokens that
    holds ``head_mass`` of its mass (tokens tied with the last one included, so that the set does not depend on an
    order among equals). w is held constant in the gradient, and 1/2 where p = q.
    """
    w = head_weight(lp.detach(), lq.detach(), head_mass)
    return _mix(w, forward_kl(lp, lq), reverse_kl(lp, lq))


def lk_alpha(lp: Tensor, lq: Tensor) -> Tensor:
    """-log alpha, alpha = sum min(p, q) the acceptance probability of a draft token (LK losses, arXiv:2602.23881)."""
    return -torch.minimum(lp, lq).logsumexp(-1)


def lk_hybrid(lp: Tensor, lq: Tensor, *, eta: float) -> Tensor:
    """lam KL(q || p) + (1 - lam) TV with lam = exp(-eta alpha) held constant in the gradient (arXiv:2602.23881)."""
    tv = total_variation(lp, lq)
    lam = (-eta * (1 - tv.detach())).exp()
    return _mix(lam, forward_kl(lp, lq), tv)


def head_weight(lp: Tensor, lq: Tensor, head_mass: float) -> Tensor:
    """Weight [...] of forward KL in :func:`adaptive_kl`: the head's share of sum |p - q|."""
    q = lq.exp()
    gap = (lp.exp() - q).abs()
    head = (gap * (q >= _head_threshold(q, head_mass).unsqueeze(-1))).sum(-1)
    total = gap.sum(-1)
    return torch.where(total > 0, head / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)


def _head_threshold(q: Tensor, head_mass: float) -> Tensor:
    """Probability [...] of the least likely token of the head. Grows the top-k until it holds the mass everywhere."""
    k, vocab = min(64, q.shape[-1]), q.shape[-1]
    while True:
        top = q.topk(k, dim=-1).values
        mass = top.cumsum(-1)
        if k == vocab or bool((mass[..., -1] >= head_mass).all()):
            break
        k = min(4 * k, vocab)
    # A token belongs to the head while the mass before it is still short.
    size = (mass - top < head_mass).sum(-1, keepdim=True)
    return top.gather(-1, size - 1).squeeze(-1)


def _expected_gap(lw: Tensor, la: Tensor, lb: Tensor) -> Tensor:
    """sum exp(lw) (la - lb), 0 where the weight is 0 whatever the logarithms are."""
    w = lw.exp()
    zero = w == 0
    return (w * (la.masked_fill(zero, 0) - lb.masked_fill(zero, 0))).sum(-1)


def _log_mixture(la: Tensor, lb: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(la + math.log(share), lb + math.log1p(-share))


def _mix(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """w a + (1 - w) b with 0 * inf = 0."""
    return torch.where(w == 0, 0, w * a) + torch.where(w == 1, 0, (1 - w) * b)


_DEFINITIONS: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "total_variation": total_variation,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "kd": forward_kl,  # its soft part; see per_token
    "lk_alpha": lk_alpha,
    "lk_hybrid": lk_hybrid,
}


def per_token(
    name: str,
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V_T]
    *,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,  # [...] int64, needed by "kd" alone
    top_k: int | None = None,
    support: Support = "teacher",
    **options: float,
) -> Tensor:  # [...]
    """Divergence of every token, in nats; differentiable with respect to the student's logits, not the teacher's.

    Computed in float32 (float64 where either input is float64). Vocabularies of different size are cut to their
    common first rows: the surplus rows of a padded vocabulary are never used. ``top_k=K`` compares the K likeliest
    tokens of ``support`` and one bucket with the exact mass of all others, see :mod:`onpolicy.losses.truncated`.
    ``kd`` is alpha CE(token, student at T=1) + (1 - alpha) T^2 KL(q_T || p_T) (Hinton et al., arXiv:1503.02531);
    its T is ``temperature``, and only its soft part is truncated by ``top_k``.

    Raises ValueError for an unknown name or option, a value out of range, or ``kd`` without token ids.
    """
    resolved = resolve_options(name, options, temperature)
    student, teacher = common_vocabulary(student_logits, teacher_logits.detach())
    lp, lq = log_probs(student, temperature), log_probs(teacher, temperature)
    lp, lq = lp.to(dtype := torch.promote_types(lp.dtype, lq.dtype)), lq.to(dtype)
    if top_k is not None:
        lp, lq = coarsen(lp, lq, top_k, support)
    lp, lq = without_dead(lp, lq)
    if name != "kd":
        return _DEFINITIONS[name](lp, lq, **resolved)
    hard = token_log_probs(student, required_ids(token_ids)).to(dtype)
    return -resolved["alpha"] * hard + (1 - resolved["alpha"]) * temperature**2 * forward_kl(lp, lq)


def divergence(
    name: str,
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V_T]
    mask: Tensor | None,  # [...] bool, True where a token counts; None counts all
    *,
    temperature: float = 1.0,
    token_ids: Tensor | None = None,  # [...] int64
    weights: Tensor | None = None,  # [...] factor of each token's loss
    denominator: float | None = None,
    top_k: int | None = None,
    support: Support = "teacher",
    **options: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Masked mean of :func:`per_token`, or masked sum / ``denominator`` (normalisation over micro-batches, processes).

    Masked tokens are cut out before anything is computed, so nothing they hold (NaN, -inf) reaches loss or gradient.
    Without any token the loss is 0 and still has a graph. Metrics, detached: ``per_token`` [...] (0 where masked),
    ``tokens`` (how many counted) and, given ``token_ids``, ``student_logprobs`` and ``teacher_logprobs`` [...] of
    these tokens at ``temperature``. Raises ValueError as :func:`per_token` does.
    """
    resolve_options(name, options, temperature)
    keep = (
        torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device) if mask is None else mask
    )
    check_mask(keep, student_logits.shape[:-1])
    student, teacher = common_vocabulary(student_logits[keep], teacher_logits[keep].detach())
    ids = None if token_ids is None else token_ids[keep]
    values = per_token(
        name, student, teacher, temperature=temperature, token_ids=ids, top_k=top_k, support=support, **options
    )
    weighted = values if weights is None else values * weights[keep].to(values.dtype)
    # The zero keeps a graph where every token is masked; summing no rows gives 0.
    loss = weighted.sum() / normaliser(denominator, int(values.numel()))

    def scatter(x: Tensor) -> Tensor:
        return torch.zeros(keep.shape, dtype=x.dtype, device=x.device).masked_scatter(keep, x.detach())

    metrics = {"per_token": scatter(values), "tokens": keep.sum().to(torch.float32)}
    if ids is not None:
        metrics["student_logprobs"] = scatter(token_log_probs(student.detach(), ids, temperature))
        metrics["teacher_logprobs"] = scatter(token_log_probs(teacher, ids, temperature))
    return loss, metrics


def without_dead(lp: Tensor, lq: Tensor) -> tuple[Tensor, Tensor]:
    """Outcomes impossible in both models made finite (:data:`DEAD`), so that no difference of them is NaN."""
    dead = torch.isneginf(lp) & torch.isneginf(lq)
    return lp.masked_fill(dead, DEAD), lq.masked_fill(dead, DEAD)


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) over the last dimension, in float32 or, for float64 logits, float64."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype)
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def token_log_probs(logits: Tensor, token_ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) [..., V] at ``token_ids`` [...]. ValueError for an id outside the common vocabulary."""
    check_token_ids(token_ids, logits.shape[-1])
    return log_probs(logits, temperature).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def common_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both cut to the smaller vocabulary. Views; [..., V] and [..., V_T] -> [..., min(V, V_T)] twice."""
    vocab = min(student.shape[-1], teacher.shape[-1])
    return student[..., :vocab], teacher[..., :vocab]
