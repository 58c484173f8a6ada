"""Matrix products of the chunked loss: hidden states to float32 logits, and gradients back.

Logits are float32 even for bf16 models: rounding a logit of 16 to bf16 moves its log-probability by up to 0.06 nats.
The product of bf16 values with a float32 result is, on CUDA, ``torch.mm(..., out_dtype=float32)``; on CPUs that
multiply bf16 values our own (:mod:`onpolicy.bf16_products`), and otherwise oneDNN's float32 product, with bf16
arithmetic inside where the CPU has a matrix unit (exact here, because the operands *are* bf16 values).

Shape legend: n tokens of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from onpolicy import bf16_products
from onpolicy.losses import _workspace

_TILE_ROWS = 16384  # head rows widened at a time: 36 MiB for D = 576


class Projection:
    """One model's output head, as the chunked loss uses it: ``logits = hidden @ head.T + bias``.

    Products use the autocast dtype where autocast is on, else bf16 (fp16) if either input is, else the inputs' own.
    """

    def __init__(self, hidden: Tensor, head: Tensor, bias: Tensor | None, vocab: int) -> None:
        self.head, self.bias = head[:vocab], None if bias is None else bias[:vocab]
        self.dtype = product_dtype(hidden, head)
        self.accumulate = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._widened = hidden.device.type == "cpu" and self.low_precision
        self._own_products = self._widened and self.dtype == torch.bfloat16 and bf16_products.available()
        self._own_logits = self._own_products and bf16_products.supports(self.head)
        self._converted: Tensor | None = None

    @property
    def low_precision(self) -> bool:
        """Whether gradients enter their products rounded to 16 bits, as in an ordinary backward pass."""
        return self.dtype in (torch.bfloat16, torch.float16)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """[n, D] -> ``out`` [n, V], float32 or float64."""
        if out.dtype != self.accumulate:  # a float32 teacher of a float64 student, or the reverse
            return out.copy_(self.logits(hidden, torch.empty_like(out, dtype=self.accumulate)))
        hidden = hidden.to(self.dtype)
        if self._own_logits and out.is_contiguous():
            bf16_products.logits(hidden, self.head, out)
        elif self._widened:
            self._widened_logits(hidden.float(), out)
        elif self.low_precision:
            torch.mm(hidden, self.head.to(self.dtype).t(), out_dtype=torch.float32, out=out)
        else:
            torch.mm(hidden, self.head.to(self.dtype).t(), out=out)
        return out if self.bias is None else out.add_(self.bias)

    def grad_hidden(self, grad: Tensor, rounded: Tensor | None) -> Tensor:
        """Gradient by the logits [n, V] (and its 16-bit copy, if there is one) -> [n, D]."""
        if self._own_logits and rounded is not None and rounded.is_contiguous() and rounded.shape[1] % 2 == 0:
            return bf16_products.hidden_gradient(rounded, self.head)
        return (grad.to(self.dtype) if rounded is None else rounded) @ self._operand()

    def add_grad_head(self, total: Tensor, grad: Tensor, rounded: Tensor | None, hidden: Tensor) -> None:
        """total [V, D] += grad.T [V, n] @ hidden [n, D], accumulated in float32 (float64); ``rounded`` as above."""
        hidden = hidden.to(self.dtype)
        if self._own_products and rounded is not None and total.dtype == torch.float32 and total.is_contiguous():
            bf16_products.add_weight_gradient(total, rounded, hidden)
        elif self.low_precision and not self._widened:
            low = grad.to(self.dtype) if rounded is None else rounded
            total += torch.mm(low.t(), hidden, out_dtype=total.dtype)
        else:
            with bf16_arithmetic(self.dtype):
                total.addmm_(grad.t(), hidden.to(total.dtype))

    def _operand(self) -> Tensor:
        """The head in the dtype of the products, made once; another projection's overwrites it."""
        if self._converted is None:
            shape = (self.head.shape[0], self.head.shape[1])
            same = self.head.dtype == self.dtype
            self._converted = (
                self.head if same else _workspace.take("head", shape, self.dtype, self.head.device).copy_(self.head)
            )
        return self._converted

    def _widened_logits(self, hidden: Tensor, out: Tensor) -> None:
        with bf16_arithmetic(self.dtype):
            if self.head.dtype == torch.float32:
                torch.mm(hidden, self.head.t(), out=out)
                return
            height = min(_TILE_ROWS, len(self.head))
            wide = _workspace.take("tile", (height, self.head.shape[1]), torch.float32, hidden.device)
            for start in range(0, len(self.head), _TILE_ROWS):
                rows = self.head[start : start + _TILE_ROWS]
                tile = wide[: len(rows)].copy_(rows)
                torch.mm(hidden, tile.t(), out=out[:, start : start + len(rows)])


def product_dtype(hidden: Tensor, head: Tensor) -> torch.dtype:
    """The dtype of the operands of the projection, see :class:`Projection`."""
    dtypes = {hidden.dtype, head.dtype}
    if torch.float64 in dtypes:
        return torch.float64
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    for low in (torch.bfloat16, torch.float16):
        if low in dtypes:
            return low
    return torch.float32


@contextmanager
def bf16_arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Within: float32 CPU products take bf16 operands and keep float32 sums, if ``dtype`` is bf16."""
    if dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
