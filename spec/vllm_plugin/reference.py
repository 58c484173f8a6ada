"""Speculative sampling by its definition, one request at a time in plain float64: what the self-test compares with.

Written apart from :mod:`spec.sampling` and :mod:`spec.verify` on purpose: a worker of vLLM must not compile numba
kernels at its start, nor import numba before vLLM registers its own.

V vocabulary. p target, q draft (Leviathan et al. 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def processed(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The law [V] a token is drawn from: temperature, then top-k, then top-p of what is left.

    Temperature 0 is one-hot at the argmax.
    """
    scores = logits.double()
    if temperature == 0:
        return one_hot(int(scores.argmax()), len(scores))
    scores = scores / temperature
    scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
    probs = scores.softmax(-1)
    ordered, tokens = probs.sort(descending=True)
    ahead = ordered.cumsum(0) - ordered  # the mass of all likelier tokens
    probs[tokens[ahead >= top_p]] = 0.0
    return probs / probs.sum()


def one_hot(token: int, size: int) -> Tensor:
    """[size] with 1 at ``token``; all zero for the padding -1."""
    row = torch.zeros(size, dtype=torch.float64)
    if token >= 0:
        row[token] = 1.0
    return row


def committed(
    p: Sequence[Tensor], q: Sequence[Tensor], drafts: Sequence[int], bonus: int, uniforms: Tensor, noise: Tensor
) -> list[int]:
    """The tokens one request commits: accepted drafts, then a recovered token or the bonus.

    ``p`` and ``q`` are the laws [V] at each drafted position, ``q`` one-hot for a deterministic draft. Draft x is
    accepted iff u q(x) <= p(x), padding (-1) never. Recovered from max(p - q, 0) by the exponential race
    argmax(residual / ``noise``), ``noise`` [V] ~ Exp(1).
    """
    for position, token in enumerate(drafts):
        p_row, q_row = p[position], q[position]
        if token >= 0 and q_row[token] > 0 and uniforms[position] * q_row[token] <= p_row[token]:
            continue
        residual = (p_row - q_row).clamp(min=0)
        return [*drafts[:position], int((residual / noise).argmax())]
    return [*drafts, bonus]
