"""Causal attention on a CPU by batched matrix products, in bounded memory and with its own backward pass.

torch's fused CPU kernel multiplies small tiles one by one, which on CPUs without AMX takes longer than the same
products in one oneDNN call (benchmarks/attention.py). Here scores are float32 (bf16 operands, float32 sums), the
softmax is float32, and probabilities are rounded to the operands' dtype before they meet the values, as in the fused
kernel. The queries of heads that share keys are stacked, so keys and values are never repeated. A few sequences are
done at a time: their scores stay in the cache, and the backward pass computes them again from the log-normalisers.

Shape legend: S sequences, s of them at a time, H heads, K key heads, G = H / K, M positions, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from onpolicy.losses._projection import bf16_products

_SCORES = 1 << 19  # elements of the scores computed at a time: 2 MiB of float32
_LONGEST = 384  # positions beyond which torch, which skips what no query sees, is faster (benchmarks/attention.py)


def fits(query: Tensor) -> bool:
    """Whether :func:`causal_attention` is the faster way for these [S, M, H, D]."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[1] <= _LONGEST


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale * query @ key.T + causal mask) @ value.

    Args:
        query: [S, M, H, D] bf16. key, value: [S, M, K, D] bf16, K dividing H.

    Returns [S, M, H, D] bf16.
    """
    return _CausalAttention.apply(query, key, value, scale)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        _, positions, heads, _ = query.shape
        saving = any(ctx.needs_input_grad[:3])
        normalisers = torch.empty(len(query), key.shape[2], heads // key.shape[2] * positions) if saving else None
        mask = _mask(positions, heads // key.shape[2])
        for part in _parts(query):
            q, k, v = _folded(query[part], key), _folded(key[part], key), _folded(value[part], key)
            scores = _scores(q, k, mask, scale)
            largest = scores.amax(-1) if normalisers is not None else None
            probs = torch.softmax(scores, -1, out=scores)
            if normalisers is not None and largest is not None:
                # p_max = exp(s_max - normaliser), at least 1 / M
                normalisers[part] = (largest - probs.amax(-1).log()).view(-1, *normalisers.shape[1:])
            _unfold(torch.bmm(probs.to(v.dtype), v), out[part])
        if normalisers is not None:
            ctx.save_for_backward(query, key, value, out, normalisers)
            ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, normalisers = ctx.saved_tensors
        d_query, d_key, d_value = (
            torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
        mask = _mask(query.shape[1], query.shape[2] // key.shape[2])
        for part in _parts(query):
            q, k, v, g = (_folded(x[part], key) for x in (query, key, value, grad))
            scores = _scores(q, k, mask, ctx.scale)
            probs = scores.sub_(normalisers[part].flatten(0, 1).unsqueeze(-1)).exp_()
            rounded = probs.to(q.dtype)
            # dS = P * (dP - rowsum(dO * O)), Dao et al. 2205.14135, appendix B
            inner = (g.float() * _folded(out[part], key)).sum(-1, keepdim=True)
            with bf16_products(q.dtype):
                d_scores = torch.bmm(g.float(), v.float().transpose(1, 2)).sub_(inner).mul_(probs).mul_(ctx.scale)
            d_scores = d_scores.to(q.dtype)
            _unfold(torch.bmm(d_scores, k), d_query[part])
            _unfold(torch.bmm(d_scores.transpose(1, 2), q), d_key[part])
            _unfold(torch.bmm(rounded.transpose(1, 2), g), d_value[part])
        return d_query, d_key, d_value, None


def _parts(query: Tensor) -> Iterator[slice]:
    sequences, positions, heads, _ = query.shape
    size = max(1, _SCORES // (heads * positions * positions))
    for start in range(0, sequences, size):
        yield slice(start, start + size)


def _mask(positions: int, group: int) -> Tensor:
    """[G*M, M] float32, -inf where a query must not look."""
    return torch.full((positions, positions), -torch.inf).triu(1).repeat(group, 1)


def _folded(states: Tensor, key: Tensor) -> Tensor:
    """[s, M, K*G, D] -> [s*K, G*M, D]: the queries of heads that share keys under one another."""
    sequences, positions, heads, size = states.shape
    shared = key.shape[2]
    split = states.view(sequences, positions, shared, heads // shared, size).permute(0, 2, 3, 1, 4)
    return split.reshape(sequences * shared, -1, size)


def _unfold(folded: Tensor, out: Tensor) -> None:
    """[s*K, G*M, D] -> ``out`` [s, M, K*G, D]."""
    sequences, positions, heads, size = out.shape
    group = folded.shape[1] // positions
    split = folded.view(sequences, heads // group, group, positions, size).permute(0, 3, 1, 2, 4)
    out.view(sequences, positions, heads // group, group, size).copy_(split)


def _scores(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[s*K, G*M, M] float32, masked."""
    with bf16_products(query.dtype):
        return torch.baddbmm(mask, query.float(), key.float().transpose(1, 2), alpha=scale)
