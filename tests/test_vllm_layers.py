"""Norms and gates of a vLLM model on a CPU; its classes stand in by name, since vLLM takes long to import."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onpolicy.bf16_products import available
from onpolicy.rollouts.vllm_layers import quicken


class CustomOp(nn.Module):
    """As vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self._forward_method = self.forward_native

    def forward(self, *args):
        return self._forward_method(*args)


class RMSNorm(CustomOp):
    def __init__(self, width: int, variance_size_override: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width).bfloat16(), requires_grad=False)
        self.variance_epsilon, self.variance_size_override, self.has_weight = 1e-5, variance_size_override, True

    def forward_native(self, x, residual=None):
        wide = x.float() if residual is None else x.float() + residual.float()
        out = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16() * self.weight
        return out if residual is None else (out, wide.bfloat16())


class SiluAndMul(CustomOp):
    @staticmethod
    def forward_native(x):
        half = x.shape[-1] // 2
        return nn.functional.silu(x[..., :half]) * x[..., half:]


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found.float(), wanted.float(), rtol=2**-6, atol=1e-6)


@pytest.mark.skipif(not available(), reason="needs a CPU that multiplies bf16")
def test_they_say_the_same() -> None:
    norm, gate, partial = RMSNorm(48), SiluAndMul(), RMSNorm(48, variance_size_override=16)
    model = nn.ModuleList([norm, gate, partial])
    x, residual = torch.randn(7, 48).bfloat16(), torch.randn(7, 48).bfloat16()
    alone, gated, (normed, stream) = norm(x), gate(x), norm(x, residual)
    quicken(model)
    assert partial._forward_method == partial.forward_native  # the norm of a part, which ours is not
    assert norm._forward_method != norm.forward_native and gate._forward_method != gate.forward_native
    assert agree(norm(x), alone) and agree(gate(x), gated)
    norm.weight.copy_(2 * norm.weight)  # new weights arrive in place
    after, kept = norm(x, residual)
    assert agree(after, 2 * normed) and torch.equal(kept, stream)


def test_float32_models_are_left_alone() -> None:
    norm = RMSNorm(8).float()
    quicken(nn.ModuleList([norm]))
    assert norm._forward_method == norm.forward_native
