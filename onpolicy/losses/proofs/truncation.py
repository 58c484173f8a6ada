"""What it costs to compare only the teacher's k likeliest tokens and, as one bucket, all others.

Sums over every sequence of the toy model with the losses' own code, beside the divergences written once more in
probabilities and summed over prefixes. P prefixes, V vocabulary, K outcomes compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onpolicy.losses.divergences import per_token
from onpolicy.losses.proofs.cases import half_jsd
from onpolicy.losses.proofs.worlds import World, per_sequence
from onpolicy.losses.toy import gradient

SIZES = (1, 2, 4)  # k; the toy model has 8 tokens


@dataclass(frozen=True)
class TruncationRow:
    """One divergence at the student's prefixes, truncated. By k; relative to the whole divergence's."""

    name: str
    value: dict[int, float]  # (truncated - whole) / whole
    gradient: dict[int, float]  # |truncated - whole| / |whole|, of the gradients with prefixes held fixed
    error: float  # largest |by sequences - by prefixes| of both, relative: what is proved to be nothing


def truncation_rows(world: World | None = None, sizes: tuple[int, ...] = SIZES) -> Iterator[TruncationRow]:
    """Every divergence but kd, whose soft part is forward KL."""
    world = world or World.make(8, 2)
    for name in EXACT:
        value, slope, error = _sums(world, name, None)
        biases, turns = {}, {}
        for k in sizes:
            truncated, its_slope, its_error = _sums(world, name, k)
            biases[k], turns[k] = (truncated - value) / value, float((its_slope - slope).norm() / slope.norm())
            error = max(error, its_error)
        yield TruncationRow(name, biases, turns, error)


def _sums(world: World, name: str, k: int | None) -> tuple[float, Tensor, float]:
    """E Σ_t D(h_t), its gradient with prefixes held fixed, and how far both are from the sums over prefixes."""
    tree, student, teacher = world.tree, world.student, world.teacher
    law = tree.sequence_probabilities(student)
    each = per_token(name, student, teacher, top_k=k)[tree.states]
    value = (law[tree.sequence_ids] * each).sum()
    samples = per_sequence(tree, student, lambda x: per_token(name, x, teacher[tree.states], top_k=k).sum())
    slope = torch.einsum("b,bpv->pv", law, samples)

    visits = tree.visits(student)

    def exact(logits: Tensor) -> Tensor:
        p, q = logits.softmax(-1), teacher.softmax(-1)
        return (visits * EXACT[name](*(p, q) if k is None else bucketed(p, q, k))).sum()

    exact_slope = gradient(exact, student)
    off = max(float((value - exact(student)).abs() / value), float((slope - exact_slope).norm() / slope.norm()))
    return float(value), slope, off


def bucketed(p: Tensor, q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[P, V] probabilities -> [P, k + 1]: the k tokens likeliest by ``q``, and all others together."""
    ids = q.argsort(-1, descending=True)[:, :k]
    kept = p.gather(-1, ids), q.gather(-1, ids)
    if k >= p.shape[-1]:
        return kept
    first, second = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in kept)
    return first, second


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def _adaptive(p: Tensor, q: Tensor) -> Tensor:
    gap, order = (p - q).abs().detach(), q.argsort(-1, descending=True)
    ranked = q.gather(-1, order)
    head = ranked.cumsum(-1) - ranked < 0.5  # the mass before a token is still short of half
    share = (gap.gather(-1, order) * head).sum(-1) / gap.sum(-1)
    return share * _kl(q, p) + (1 - share) * _kl(p, q)


def _hybrid(p: Tensor, q: Tensor) -> Tensor:
    acceptance = torch.minimum(p, q).sum(-1)
    share = (-3 * acceptance.detach()).exp()
    return share * _kl(q, p) + (1 - share) * (1 - acceptance)


EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # p student, q teacher, with the options' defaults
    "forward_kl": lambda p, q: _kl(q, p),
    "reverse_kl": _kl,
    "jsd": half_jsd,
    "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
    "skew_forward_kl": lambda p, q: _kl(q, 0.1 * q + 0.9 * p),
    "skew_reverse_kl": lambda p, q: _kl(p, 0.1 * p + 0.9 * q),
    "adaptive_kl": _adaptive,
    "lk_alpha": lambda p, q: -torch.minimum(p, q).sum(-1).log(),
    "lk_hybrid": _hybrid,
}
