"""Causal attention on a CPU, in bounded memory and with its own backward pass.

torch's fused CPU kernel multiplies small tiles one by one, which takes longer on CPUs without AMX
(benchmarks/attention.py). Here scores are float32 (bf16 operands, float32 sums), the softmax is float32, and
probabilities are rounded to the operands' dtype before they meet the values, as in the fused kernel. Both passes are
kernels of our own where the CPU multiplies bf16 values. Elsewhere a few sequences at a time go through batched
products: the queries of heads that share keys are stacked, so keys and values are never repeated, their scores stay in
the cache, and the backward pass computes them again from the log-normalisers.

Shape legend: S sequences, s of them at a time, H heads, K key heads, G = H / K, M positions, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy.bf16_bits import bits, words
from onpolicy.bf16_products import available
from onpolicy.losses import _workspace
from onpolicy.losses._projection import bf16_arithmetic

_SCORES = 1 << 19  # elements of the scores computed at a time: 2 MiB of float32
_LONGEST = 512  # positions beyond which torch's backward pass, which skips what no query sees, is faster


def fits(query: Tensor) -> bool:
    """Whether :func:`causal_attention` is the faster way for these [S, M, H, D] (benchmarks/attention.py)."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    return query.shape[1] <= _LONGEST or (available() and not (query.requires_grad and torch.is_grad_enabled()))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor | None = None) -> Tensor:
    """softmax(scale * query @ key.T + causal mask) @ value.

    Args:
        query: [S, M, H, D] bf16. key, value: [S, M, K, D] bf16, K dividing H.
        spans: [S, 2] int64, the first position whose result is used, and the one after the last; by default all.

    Returns [S, M, H, D] bf16, undefined outside the spans.
    """
    if spans is None:
        spans = torch.tensor([0, query.shape[1]]).expand(len(query), 2)
    return _CausalAttention.apply(query, key, value, scale, spans)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        sequences, positions, heads, _ = query.shape
        shared = key.shape[2]
        normalisers = torch.empty(sequences, shared, heads // shared * positions)
        forward = _by_own_kernel if _own(query) else _by_products
        forward(query, key, value, scale, spans, out, normalisers)
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(query, key, value, out, normalisers, spans)
            ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, out, normalisers, spans = ctx.saved_tensors
        gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
        backward = _backward_by_own_kernel if _own(query) else _backward_by_products
        backward(query, key, value, grad, out, normalisers, ctx.scale, spans, *gradients)
        return *gradients, None, None  # type: ignore[return-value]


def _own(query: Tensor) -> bool:
    """Whether our own kernels take these."""
    return available() and query.shape[-1] % 2 == 0


def _by_own_kernel(
    query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor, out: Tensor, normalisers: Tensor
) -> None:
    """Fills ``out`` [S, M, H, D] and ``normalisers`` [S, K, G * M], within the spans at least."""
    from onpolicy.layers import attention_kernels as kernels

    operands = [words(states) for states in (query, key, value)]
    kernels.attend(
        torch.get_num_threads(),
        *operands,
        np.float32(scale),
        spans.contiguous().numpy(),
        bits(out),
        normalisers.numpy(),
    )


def _backward_by_own_kernel(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, normalisers: Tensor, scale: float,
    spans: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor,
) -> None:  # fmt: skip
    """Fills the last three, of the shapes of query, key and value; ``grad`` and ``out`` count within the spans."""
    from onpolicy.layers import attention_kernels as kernels

    operands = [words(states) for states in (query, key, value, grad)]
    kernels.attend_backward(
        torch.get_num_threads(), *operands, bits(grad.contiguous()), bits(out), normalisers.numpy(), np.float32(scale),
        spans.contiguous().numpy(), bits(d_query), bits(d_key), bits(d_value),
    )  # fmt: skip


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, scale: float, spans: Tensor, out: Tensor, normalisers: Tensor
) -> None:
    """The same, at all positions."""
    from onpolicy.layers import attention_kernels as kernels

    shared = key.shape[2]
    for part in _parts(query):
        q, k, v = (_folded(states[part], shared) for states in (query, key, value))
        scores = _products("scores", q, k)
        probs = torch.empty(scores.shape, dtype=v.dtype)
        kernels.softmax(scores.numpy(), np.float32(scale), bits(probs), normalisers[part].flatten(0, 1).numpy())
        _unfold(torch.bmm(probs, v), out[part])


def _backward_by_products(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, out: Tensor, normalisers: Tensor, scale: float,
    spans: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor,
) -> None:  # fmt: skip
    """The same, from gradients that are zero outside the spans."""
    from onpolicy.layers import attention_kernels as kernels

    shared = key.shape[2]
    inner = _folded_inner(grad, out, shared)
    for part in _parts(query):
        q, k, v, g = (_folded(x[part], shared) for x in (query, key, value, grad))
        scores, d_probs = _products("scores", q, k), _products("gradient", g, v)
        probs, d_scores = (torch.empty(scores.shape, dtype=q.dtype) for _ in range(2))
        kernels.gradient(
            scores.numpy(), normalisers[part].flatten(0, 1).numpy(), d_probs.numpy(),
            inner[part].flatten(0, 1).numpy(), np.float32(scale), bits(probs), bits(d_scores),
        )  # fmt: skip
        _unfold(torch.bmm(d_scores, k), d_query[part])
        _unfold(torch.bmm(d_scores.transpose(1, 2), q), d_key[part])
        _unfold(torch.bmm(probs.transpose(1, 2), g), d_value[part])


def _parts(query: Tensor) -> Iterator[slice]:
    sequences, positions, heads, _ = query.shape
    size = max(1, _SCORES // (heads * positions * positions))
    for start in range(0, sequences, size):
        yield slice(start, start + size)


def _folded(states: Tensor, shared: int) -> Tensor:
    """[s, M, K*G, D] -> [s*K, G*M, D]: the queries of heads that share keys under one another."""
    sequences, positions, heads, size = states.shape
    split = states.view(sequences, positions, shared, heads // shared, size).permute(0, 2, 3, 1, 4)
    return split.reshape(sequences * shared, -1, size)


def _unfold(folded: Tensor, out: Tensor) -> None:
    """[s*K, G*M, D] -> ``out`` [s, M, K*G, D]."""
    sequences, positions, heads, size = out.shape
    group = folded.shape[1] // positions
    split = folded.view(sequences, heads // group, group, positions, size).permute(0, 3, 1, 2, 4)
    out.view(sequences, positions, heads // group, group, size).copy_(split)


def _folded_inner(grad: Tensor, out: Tensor, shared: int) -> Tensor:
    """sum_d dO * O of every query, [S, K, G*M] float32."""
    inner = (grad.float() * out).sum(-1)  # [S, M, H]
    sequences, positions, heads = inner.shape
    split = inner.view(sequences, positions, shared, heads // shared)
    return split.permute(0, 2, 3, 1).reshape(sequences, shared, -1)


def _products(name: str, left: Tensor, right: Tensor) -> Tensor:
    """[s*K, G*M, D] x [s*K, M, D] -> [s*K, G*M, M] float32, in a buffer that the next call of this name overwrites."""
    shape = (left.shape[0], left.shape[1], right.shape[1])
    out = _workspace.take(f"attention_{name}", shape, torch.float32, left.device)
    with bf16_arithmetic(left.dtype):
        return torch.bmm(left.float(), right.float().transpose(1, 2), out=out)
