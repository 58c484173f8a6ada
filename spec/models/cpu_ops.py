"""Between the products on a CPU: compiled kernels on the bits of bf16 tensors. See :class:`spec.models.decoder.Ops`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spec.kv_cache import Span
from spec.models import kernels_numba as kernels

if TYPE_CHECKING:
    from spec.models.decoder import Plan
    from spec.models.weights import DecoderWeights

_NONE = np.empty(0, np.float32)
_NO_ROWS = np.empty((0, 0), np.int16)
_PARALLEL_FROM = 64  # row-positions of attention, or rows of the MLP: below, threads cost more than they save


@dataclass(frozen=True)
class _Begun:
    positions: np.ndarray  # [T]
    places: np.ndarray  # [T] in the pool
    firsts: np.ndarray  # [T]
    units: np.ndarray  # [U, 2] runs of rows of one sequence
    attend: Any  # the kernel for one thread or for several


class CpuOps:
    """Ops of a bf16 model whose head size is a multiple of 16."""

    def __init__(self, weights: DecoderWeights, pool: int, positions: int) -> None:
        self._epsilon, self._scale = np.float32(weights.epsilon), np.float32(weights.head_size**-0.5)
        self._heads, size, shared = weights.heads, weights.head_size, weights.key_heads
        self._embedding = bits(weights.embedding)
        self._cos, self._sin = (angle.numpy() for angle in weights.angles(positions))
        self._norms = [(_optional(layer.query_norm), _optional(layer.key_norm)) for layer in weights.layers]
        # np.zeros: pages nobody has used take no memory.
        block = kernels.BLOCK
        self._keys = [np.zeros((shared, pool // block, size, block), np.int16) for _ in weights.layers]
        self._values = [np.zeros((shared, pool, size), np.int16) for _ in weights.layers]

    def begin(self, plan: Plan) -> _Begun:
        """See :class:`spec.models.decoder.Ops`."""
        units, first = [], 0
        for length in plan.lengths.tolist():
            units += [(first + at, min(kernels.ROWS, length - at)) for at in range(0, length, kernels.ROWS)]
            first += length
        much = int(plan.positions.sum()) + len(plan.positions) >= _PARALLEL_FROM and torch.get_num_threads() > 1
        return _Begun(
            plan.positions,
            plan.positions + plan.firsts,
            plan.firsts,
            np.array(units, np.int64),
            kernels.attend_parallel if much else kernels.attend,
        )

    def embed(self, ids: Tensor) -> np.ndarray:
        """See :class:`spec.models.decoder.Ops`."""
        residual = np.empty((len(ids), self._embedding.shape[1]), np.float32)
        kernels.embed(ids.numpy(), self._embedding, residual)
        return residual

    def add_norm(self, residual: np.ndarray, delta: Tensor | None, weight: Tensor) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        out = torch.empty(residual.shape, dtype=torch.bfloat16)
        change = _NO_ROWS if delta is None else bits(delta)
        kernels.add_norm(residual, change, weight.numpy(), self._epsilon, bits(out))
        return out

    def attend(self, layer: int, qkv: Tensor, begun: _Begun) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        keys, values = self._keys[layer], self._values[layer]
        query_norm, key_norm = self._norms[layer]
        out = torch.empty(len(qkv), self._heads * values.shape[2], dtype=torch.bfloat16)
        rows, angles = bits(qkv), (self._cos, self._sin)
        kernels.store(rows, begun.positions, begun.places, *angles, key_norm, self._epsilon, self._heads, keys, values)
        begun.attend(
            rows, begun.positions, begun.firsts, begun.units, *angles, query_norm, self._epsilon, self._scale,
            keys, values, bits(out),
        )  # fmt: skip
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=torch.bfloat16)
        parallel = len(out) >= _PARALLEL_FROM and torch.get_num_threads() > 1
        (kernels.silu_mul_parallel if parallel else kernels.silu_mul)(bits(gate_up), bits(out))
        return out

    def take(self, residual: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """See :class:`spec.models.decoder.Ops`."""
        return residual if len(rows) == len(residual) else residual[rows]

    def copy(self, source: Span, target: Span, tokens: int) -> None:
        """See :class:`spec.models.decoder.Ops`."""
        blocks, block = -(-tokens // kernels.BLOCK), kernels.BLOCK
        begin, end = source.start // block, target.start // block
        for keys, values in zip(self._keys, self._values, strict=True):
            keys[:, end : end + blocks] = keys[:, begin : begin + blocks]
            values[:, target.start : target.start + tokens] = values[:, source.start : source.start + tokens]


def bits(tensor: Tensor) -> np.ndarray:
    """The memory of a bf16 tensor as int16."""
    return tensor.view(torch.int16).numpy()


def _optional(weight: Tensor | None) -> np.ndarray:
    return _NONE if weight is None else weight.numpy()
