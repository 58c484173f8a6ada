"""Linear layers on weights laid out once for VDPBF16PS: bf16 operands, float32 sums.

Shape legend: n rows, N outputs, I inputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from onpolicy.losses._bf16_products import available


class PackedLinear:
    """x [..., I] bf16 -> x @ weight.T + bias, [..., N].

    Args:
        weight: [N, I] bf16, not kept.
        bias: [N] or None.
        dtype: of the result, bf16 or float32; sums are float32 in both.

    A row's result depends on no other row.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        from onpolicy import packed_linear_kernels as kernels
        from onpolicy.bf16_block import BROAD

        self.outputs, self.inputs = weight.shape
        self.bias, self.dtype = bias, dtype
        self._panels = np.empty((-(-self.outputs // BROAD), self.inputs // 2, BROAD), np.uint32)
        kernels.pack(torch.get_num_threads(), _words(weight), self._panels)

    def __call__(self, x: Tensor) -> Tensor:
        from onpolicy import packed_linear_kernels as kernels

        flat = x.reshape(-1, self.inputs)
        out = torch.empty(len(flat), self.outputs, dtype=self.dtype)
        none = out[:0]
        wide, narrow = (out, none) if self.dtype == torch.float32 else (none, out)
        kernels.multiply(
            torch.get_num_threads(), _words(flat), self._panels, _as(wide, torch.float32), _as(narrow, torch.int16)
        )
        out = out if self.bias is None else out.add_(self.bias)
        return out.view(*x.shape[:-1], self.outputs)


def supports(weight: Tensor) -> bool:
    """Whether a :class:`PackedLinear` can be made of this weight here."""
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return on_cpu and weight.ndim == 2 and weight.shape[1] % 2 == 0 and available()


def _words(matrix: Tensor) -> np.ndarray:
    """Pairs of bf16 values along the rows."""
    return matrix.detach().contiguous().view(torch.int32).numpy().view(np.uint32)


def _as(out: Tensor, dtype: torch.dtype) -> np.ndarray:
    """The memory of ``out`` as another dtype; without rows, an array of its shape."""
    return (
        out.view(dtype).numpy() if len(out) else np.empty((0, out.shape[1]), torch.empty(0, dtype=dtype).numpy().dtype)
    )
