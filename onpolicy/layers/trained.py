"""What a decoder's layers compute, with gradients, from float32 weights by bf16 products: a student's layers.

As under autocast, but weights are laid out for the CPU's instruction, norms and gates are one pass each, and gradients
of weights are summed in float32 and never rounded.

Shape legend: N outputs, I inputs, C columns of a norm, F of a gate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from onpolicy.bf16_bits import bits
from onpolicy.bf16_products import add_weight_gradient
from onpolicy.layers.packed import PackedLinear, silu_mul

_TOKENS = 256  # whose products are added to a weight's gradient at a time: they stay in the cache


def project(x: Tensor, *weights: Tensor) -> Tensor:
    """x [..., I] bf16 times all the weights [N_i, I] under one another -> [..., sum of N_i] bf16.

    Both I and the sum of N_i even. The weights' gradients have their dtype.
    """
    return _Project.apply(x, *weights)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * weight, float32 [..., C] and [C], rounded once to bf16."""
    return _RMSNorm.apply(x, weight, epsilon)


def gated(x: Tensor) -> Tensor:
    """silu(x[..., :F]) * x[..., F:], bf16 [..., 2 F] -> [..., F]."""
    return _SiluMul.apply(x)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        stacked = torch.empty(sum(map(len, weights)), x.shape[-1], dtype=torch.bfloat16)
        for part, weight in zip(stacked.split([len(weight) for weight in weights]), weights, strict=True):
            part.copy_(weight)
        ctx.save_for_backward(x, stacked)
        ctx.sizes, ctx.dtypes = [len(weight) for weight in weights], [weight.dtype for weight in weights]
        return PackedLinear(stacked)(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, stacked = ctx.saved_tensors
        grad = grad.contiguous()
        d_x = PackedLinear(stacked, transposed=True)(grad) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return d_x, *[None for _ in ctx.sizes]
        total = torch.zeros(stacked.shape)
        outputs, inputs = stacked.shape
        for slopes, states in zip(
            grad.view(-1, outputs).split(_TOKENS), x.reshape(-1, inputs).split(_TOKENS), strict=True
        ):
            add_weight_gradient(total, slopes, states)
        return d_x, *[part.to(dtype) for part, dtype in zip(total.split(ctx.sizes), ctx.dtypes, strict=True)]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        from onpolicy.layers import trained_kernels as kernels

        flat = x.reshape(-1, x.shape[-1]).contiguous()
        out, factors = torch.empty_like(flat, dtype=torch.bfloat16), torch.empty(len(flat))
        arrays = [flat.numpy(), weight.detach().numpy(), np.float32(epsilon), bits(out), factors.numpy()]
        kernels.rms_norm(torch.get_num_threads(), *arrays)
        ctx.save_for_backward(flat, weight, factors)
        return out.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        from onpolicy.layers import trained_kernels as kernels

        flat, weight, factors = ctx.saved_tensors
        threads, slopes = torch.get_num_threads(), grad.reshape(flat.shape).contiguous()
        d_x, d_weights = torch.empty_like(flat), torch.zeros(threads, len(weight))
        arrays = [bits(slopes), *(states.numpy() for states in (flat, weight.detach(), factors, d_x, d_weights))]
        kernels.rms_norm_backward(threads, *arrays)
        return d_x.view(grad.shape), d_weights.sum(0), None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return silu_mul(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from onpolicy.layers import trained_kernels as kernels

        (x,) = ctx.saved_tensors
        flat, slopes = x.reshape(-1, x.shape[-1]).contiguous(), grad.reshape(-1, grad.shape[-1]).contiguous()
        d_x = torch.empty_like(flat)
        kernels.silu_mul_backward(torch.get_num_threads(), bits(flat), bits(slopes), bits(d_x))
        return d_x.view(x.shape)
