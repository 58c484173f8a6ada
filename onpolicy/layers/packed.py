"""Linear layers on weights laid out once for VDPBF16PS: bf16 operands, float32 sums. And what stands between them.

Shape legend: n rows, N outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from onpolicy.bf16_bits import bits, words
from onpolicy.bf16_products import available


class _Packed:
    _panels: np.ndarray  # words [ceil(N / 48), I / 2, 48]

    def memory(self) -> Tensor:
        """The packed weights, where they lie: for those who count what a model takes."""
        return torch.from_numpy(self._panels.view(np.int32))


class PackedLinear(_Packed):
    """x [..., I] bf16 -> x @ weight.T + bias, [..., N].

    Args:
        weight: [N, I] bf16, not kept; I even.
        bias: [N] or None.
        dtype: of the result, bf16 or float32; sums are float32 in both.
        transposed: multiply by ``weight`` [I, N] itself, as the gradient of a linear layer by its inputs does.

    A row's result depends on no other row.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype = torch.bfloat16,
        transposed: bool = False,
    ) -> None:
        self.outputs, self.inputs = weight.shape[::-1] if transposed else weight.shape
        self.bias, self.dtype = bias, dtype
        self._panels = _packed_transposed(weight) if transposed else _packed(weight)
        self._none = np.empty((0, self.outputs), np.int16 if dtype == torch.float32 else np.float32)

    def __call__(self, x: Tensor) -> Tensor:
        from onpolicy.layers import packed_kernels as kernels

        flat = x if x.ndim == 2 else x.reshape(-1, self.inputs)
        out = torch.empty(len(flat), self.outputs, dtype=self.dtype)
        if self.dtype == torch.float32:
            results = out.numpy(), self._none
        else:
            results = self._none, bits(out)
        kernels.multiply(torch.get_num_threads(), words(flat), self._panels, *results)
        out = out if self.bias is None else out.add_(self.bias)
        return out if x.ndim == 2 else out.view(*x.shape[:-1], self.outputs)


class PackedGate(_Packed):
    """x [..., I] bf16 -> silu(x @ gate.T) * (x @ up.T), [..., F] bf16, rounded once.

    gate, up: [F, I] bf16, not kept.
    """

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        from onpolicy.bf16_block import BROAD

        self.outputs, self.inputs = gate.shape
        half = BROAD // 2
        panels = -(-self.outputs // half)
        both = gate.new_zeros(2, panels * half, self.inputs)
        both[0, : self.outputs], both[1, : self.outputs] = gate, up
        interleaved = both.view(2, panels, half, self.inputs).transpose(0, 1).reshape(-1, self.inputs)
        self._panels = _packed(interleaved)

    def __call__(self, x: Tensor) -> Tensor:
        from onpolicy.layers import packed_kernels as kernels

        flat = x.reshape(-1, self.inputs)
        out = torch.empty(len(flat), self.outputs, dtype=torch.bfloat16)
        kernels.multiply_gated(torch.get_num_threads(), words(flat), self._panels, bits(out))
        return out.view(*x.shape[:-1], self.outputs)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
    """x / sqrt(mean x^2 + epsilon) * weight, rounded once: bf16 [..., C], weight [C].

    Given ``residual`` (contiguous), x is added to it first, in place, and the sum's norm is taken.
    """
    from onpolicy.layers import packed_kernels as kernels

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(flat)
    stream = flat[:0] if residual is None else residual.view(flat.shape)
    operands = [bits(states) for states in (flat, stream, weight)]
    kernels.rms_norm(torch.get_num_threads(), *operands, np.float32(epsilon), bits(out))
    return out.view(x.shape)


def silu_mul(x: Tensor) -> Tensor:
    """silu(x[..., :F]) * x[..., F:], rounded once: bf16 [..., 2 F] -> [..., F]."""
    from onpolicy.layers import packed_kernels as kernels

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(len(flat), flat.shape[1] // 2, dtype=torch.bfloat16)
    kernels.silu_mul(torch.get_num_threads(), bits(flat), bits(out))
    return out.view(*x.shape[:-1], -1)


def supports(weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a :class:`PackedLinear` can be made here of this weight, stored in this dtype."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == dtype
    return on_cpu and weight.ndim == 2 and weight.shape[1] % 2 == 0 and available()


def _packed(weight: Tensor) -> np.ndarray:
    """[N, I] bf16 -> words [ceil(N / 48), I / 2, 48]."""
    from onpolicy.bf16_block import BROAD
    from onpolicy.layers import packed_kernels as kernels

    panels = np.empty((-(-len(weight) // BROAD), weight.shape[1] // 2, BROAD), np.uint32)
    kernels.pack(torch.get_num_threads(), words(weight), panels)
    return panels


def _packed_transposed(weight: Tensor) -> np.ndarray:
    """[I, N] bf16 -> words [ceil(N / 48), I / 2, 48]."""
    from onpolicy import bf16_kernels as kernels
    from onpolicy.bf16_block import BROAD

    inputs, outputs = weight.shape
    panels = np.empty((-(-outputs // BROAD), inputs // 2, BROAD), np.uint32)
    kernels.pack_tokens(torch.get_num_threads(), bits(weight.contiguous()).view(np.uint16), panels)
    return panels
