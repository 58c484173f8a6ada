"""Verification in batched torch, for GPUs: no Python loop over requests, only over positions of a draft.

Shapes as in :mod:`spec.verify.block`; K is the longest draft. Sums are float64; temporaries are [B, V].
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spec.verify.block import Drafts, Mode


def laws(target: Tensor, drafts: Drafts, mode: Mode) -> tuple[Tensor, Tensor]:
    """Acceptance probabilities [M] and normalised last-token laws [N, V], float64."""
    accept, weights, valid = _acceptance(target, drafts, mode)
    last = torch.empty(target.shape, dtype=torch.float64, device=target.device)
    starts = _starts(drafts, target.device)
    for tau in range(valid.shape[1] + 1):
        mine = torch.from_numpy(np.flatnonzero(drafts.host_lengths >= tau)).to(target.device)
        tau_b = torch.full_like(mine, tau)
        last[(starts[mine] + mine + tau)] = _last_laws(target, drafts, mine, tau_b, weights[mine, tau])
    return accept[valid], last / last.sum(-1, keepdim=True)


def decide(
    target: Tensor, drafts: Drafts, mode: Mode, accept_u: Tensor, last_u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """accepted [B], tokens [B], acceptance probabilities [M] from uniforms [M] and [N]."""
    accept, weights, valid = _acceptance(target, drafts, mode)
    noise = torch.ones_like(accept)  # 1 is never below a probability
    noise[valid] = accept_u
    passes = (noise < accept) & valid
    steps = torch.arange(1, accept.shape[1] + 1, device=target.device)
    if mode == "token":
        accepted = passes.long().cumprod(1).sum(1)
    else:
        accepted = torch.where(passes, steps, 0).amax(1) if len(steps) else passes.sum(1)
    everyone = torch.arange(len(drafts.lengths), device=target.device)
    law = _last_laws(target, drafts, everyone, accepted, weights.gather(1, accepted[:, None])[:, 0])
    tokens = inverse_cdf(law, last_u[_starts(drafts, target.device) + everyone + accepted])
    return accepted, tokens, accept[valid]


def inverse_cdf(law: Tensor, uniforms: Tensor) -> Tensor:
    """[N] tokens: the first whose cumulated mass exceeds its uniform share of the row's total."""
    cdf = law.double().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    found = torch.searchsorted(cdf, uniforms.double()[:, None] * total, right=True)
    return torch.minimum(found, torch.searchsorted(cdf, total))[:, 0]  # rounding must not run past the last mass


def _starts(drafts: Drafts, device: torch.device) -> Tensor:
    return torch.from_numpy(drafts.token_starts).to(device, non_blocking=True)


def _acceptance(target: Tensor, drafts: Drafts, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    """[B, K] acceptance probabilities, [B, K+1] residual weights and [B, K] which of them exist."""
    device, batch = target.device, len(drafts.lengths)
    longest = int(drafts.host_lengths.max(initial=0))
    lengths = torch.from_numpy(drafts.host_lengths).to(device, non_blocking=True)
    everyone = torch.arange(batch, device=device)
    starts = _starts(drafts, device)
    accept = torch.zeros(batch, longest, dtype=torch.float64, device=device)
    weights = torch.ones(batch, longest + 1, dtype=torch.float64, device=device)
    valid = torch.arange(longest, device=device) < lengths[:, None]
    for i in range(longest):
        at = torch.where(valid[:, i], starts + i, 0)
        token, row = drafts.ids[at], drafts.probs_rows[at]
        p = target[at + everyone if i == 0 else torch.where(valid[:, i], at + everyone, 0), token].double()
        q = torch.ones_like(p) if drafts.probs is None else _chosen(drafts.probs, row, token)
        ratio = torch.where(q > 0, p / q, (p > 0).double())
        before = weights[:, i] if mode == "block" else 1.0
        weights[:, i + 1] = (before * ratio).clamp(max=1)
    accept = weights[:, 1:].clone()
    if mode == "token":
        return accept, torch.ones_like(weights), valid
    for i in range(1, longest):  # a shorter prefix passes with h_i, the whole draft with w_K
        inner = valid[:, i]
        surplus = _excess(target, drafts, everyone, torch.where(inner, i, 0), weights[:, i]).sum(-1)
        short = surplus + 1 - weights[:, i]
        passing = torch.where(short > 0, surplus / short, 1.0)
        accept[:, i - 1] = torch.where(inner, passing, accept[:, i - 1])
    return accept, weights, valid


def _chosen(probs: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """[B] draft probability of each token, 1 for deterministic proposals."""
    return torch.where(row >= 0, probs[row.clamp(min=0), token].double(), 1.0)


def _excess(target: Tensor, drafts: Drafts, who: Tensor, tau: Tensor, weight: Tensor) -> Tensor:
    """max(w p - q, 0) of requests ``who`` after ``tau`` accepted tokens, [B, V]; w p where nothing was drafted."""
    at = _starts(drafts, target.device)[who] + tau
    scaled = weight[:, None] * target[at + who].double()
    if not len(drafts.ids):
        return scaled
    lengths = torch.from_numpy(drafts.host_lengths).to(target.device, non_blocking=True)[who]
    drafted = tau < lengths
    at = torch.where(drafted, at, 0)
    row = torch.where(drafted, drafts.probs_rows[at], -1)
    q = torch.zeros_like(scaled)
    if drafts.probs is not None and len(drafts.probs):
        q = torch.where((row >= 0)[:, None], drafts.probs[row.clamp(min=0)].double(), q)
    one_hot = (drafted & (row < 0)).double()[:, None]
    q = q.scatter_add(1, drafts.ids[at][:, None], one_hot)
    return (scaled - q).clamp(min=0)


def _last_laws(target: Tensor, drafts: Drafts, who: Tensor, tau: Tensor, weight: Tensor) -> Tensor:
    """Unnormalised laws of the token after ``tau`` accepted ones, [B, V]; p where rounding left no residual."""
    excess = _excess(target, drafts, who, tau, weight)
    p = target[_starts(drafts, target.device)[who] + who + tau].double()
    lengths = torch.from_numpy(drafts.host_lengths).to(target.device, non_blocking=True)[who]
    return torch.where(((tau < lengths) & (excess.sum(-1) > 0))[:, None], excess, p)
