"""Matrix products with weights laid out once for the machine: the time of a small batch is the time to read them.

A row's result does not depend on the other rows: the products of a step may be grouped in any way.

Shape legend: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

Quantization = Literal["none", "int8", "int4", "unpacked"]
_GROUP = 32  # weights that share a scale and a zero point, int4
_TILE = 16  # rows computed together where nothing else keeps a row's result the same
_PROBED = (2, 3, 8, 17)  # numbers of rows that are tried
_SHORT = 1024  # inputs from which a single row is known to be added up in another order (seldom enough to miss it)


class Linear(Protocol):
    """x [M, K] -> x @ weight.T + bias, [M, N], both in the model's dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


def make_linear(weight: Tensor, bias: Tensor | None = None, quantization: Quantization = "none") -> Linear:
    """The fastest product of its kind for ``weight`` [N, K] where it lies.

    - none, CPU, bf16: oneDNN on a pre-packed copy, where this machine has such a product. Elsewhere: torch's own.
    - unpacked: torch's own, whatever there is, on ``weight`` itself: slower, and takes no memory.
    - int8: one scale a row, weight-only (``torch._weight_int8pack_mm``); int4: a scale and a zero point for every 32
      weights (``_weight_int4pack_mm_for_cpu``). CPU and bf16 only; the quantised weights then *are* the model.

    Raises ValueError for an unknown kind, or one that this device, dtype or shape does not have.
    """
    if quantization not in get_args(Quantization):
        raise ValueError(f"unknown quantization {quantization!r}: choose one of {', '.join(get_args(Quantization))}")
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    if quantization in ("none", "unpacked"):
        packed = quantization == "none" and on_cpu and _packs_bf16()
        return _Packed(weight, bias) if packed else _Plain(weight, bias)
    if not on_cpu:
        raise ValueError(
            f"{quantization} weights need a bf16 model on a CPU, this one is {weight.dtype} on {weight.device}"
        )
    return _Int8(weight, bias) if quantization == "int8" else _Int4(weight, bias)


def _packs_bf16() -> bool:
    """oneDNN is there, and has bf16 products for this CPU (AVX-512 or better): elsewhere they raise, or are slow."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Plain:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class _Packed:
    """oneDNN with the weight in its own layout, as torch's inductor compiles it.

    oneDNN picks a kernel by shape, and two kernels may add up a long row in another order (single rows of more than
    1,024 inputs do). Which numbers of rows agree is tried once for every shape of weights.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = bias
        self.least, self.most = _agreeing(self._product, *weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows >= self.least and (self.most is None or rows <= self.most):
            return self._product(x)
        parts = [self._product(_padded(part, self.least)) for part in x.split(self.most or rows)]
        return torch.cat(parts)[:rows]

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")  # type: ignore[no-any-return]


_agreements: dict[tuple[int, int], tuple[int, int | None]] = {}


def _agreeing(product: Callable[[Tensor], Tensor], outputs: int, inputs: int) -> tuple[int, int | None]:
    """Least and largest number of rows (None: any) between which a row's result is always the same."""
    if (outputs, inputs) not in _agreements:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4 * max(_PROBED), inputs, generator=generator).bfloat16()
        whole = product(x)
        together = all(torch.equal(_in_parts(product, x, rows), whole) for rows in _PROBED)
        alone = inputs <= _SHORT and torch.equal(_in_parts(product, x, 1), whole)
        _agreements[outputs, inputs] = (1 if alone else 2, None) if together else (_TILE, _TILE)
    return _agreements[outputs, inputs]


def _in_parts(product: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    return torch.cat([product(part) for part in x.split(rows)])


def _padded(x: Tensor, rows: int) -> Tensor:
    return x if len(x) >= rows else torch.cat([x, x.new_zeros(rows - len(x), x.shape[1])])


class _Int8:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        wide = weight.float()
        scale = wide.abs().amax(1).clamp_min(1e-12) / 127
        self.weight = (wide / scale.unsqueeze(1)).round().to(torch.int8).contiguous()
        self.scale, self.bias = scale.to(weight.dtype), bias

    def __call__(self, x: Tensor) -> Tensor:
        out = torch._weight_int8pack_mm(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias


class _Int4:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        outputs, inputs = weight.shape
        if inputs % _GROUP or outputs % 16:
            raise ValueError(
                f"int4 needs rows of a multiple of {_GROUP} weights and 16 of them, not {tuple(weight.shape)}"
            )
        groups = weight.float().view(outputs, inputs // _GROUP, _GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-12)
        codes = ((groups - low) / scale).round().clamp_(0, 15).to(torch.int32).view(outputs, inputs)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # The kernel computes (code - 8) * scale + zero.
        self.scales = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().to(weight.dtype)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, _GROUP, self.scales)
        return out if self.bias is None else out + self.bias
