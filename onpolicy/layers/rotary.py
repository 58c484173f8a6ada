"""Queries, keys and values of rows, turned by their positions and laid out as the completions alone, in one pass.

Shape legend: R rows, L positions of a row, S completions, M positions of the longest of them with its prompt, H heads,
K key heads, D head size (onpolicy/attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from onpolicy.attention import Layout
from onpolicy.bf16_bits import bits


def lay_out(states: Tensor, cos: Tensor, sin: Tensor, layout: Layout, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """states [R, L, (H + 2 K) D] bf16, cos and sin [R or 1, L, D] -> query [S, M, H, D], key and value [S, M, K, D].

    Rotary position embeddings (Su et al. 2104.09864) in transformers' arrangement, dimension j with j + D / 2.
    """
    return _LayOut.apply(states, cos, sin, layout, heads)  # type: ignore[return-value]


class _LayOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, layout: Layout, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        from onpolicy.layers import rotary_kernels as kernels

        rows, length, width = states.shape
        size = cos.shape[-1]
        shared = (width // size - heads) // 2
        angles = [x.float().expand(rows, length, size).reshape(-1, size) for x in (cos, sin)]
        shape = layout.gather.shape
        out = tuple(torch.empty(*shape, count, size, dtype=states.dtype) for count in (heads, shared, shared))
        flat = states.reshape(-1, width).contiguous()
        kernels.lay_out(
            torch.get_num_threads(), bits(flat), *(x.numpy() for x in angles), layout.gather.flatten().numpy(),
            *(bits(x.view(shape.numel(), -1)) for x in out),
        )  # fmt: skip
        ctx.save_for_backward(*angles)
        ctx.layout, ctx.shape = layout, states.shape
        return out  # type: ignore[return-value]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        from onpolicy.layers import rotary_kernels as kernels

        slots, begins = ctx.layout.sources
        angles = [x.numpy() for x in ctx.saved_tensors]
        flat = [bits(grad.contiguous().view(ctx.layout.gather.numel(), -1)) for grad in gradients]
        out = torch.empty(ctx.shape, dtype=torch.bfloat16)
        kernels.lay_out_backward(
            torch.get_num_threads(), *flat, *angles, slots.numpy(), begins.numpy(), bits(out.view(-1, ctx.shape[-1]))
        )
        return out, None, None, None, None
