"""Between the products in plain torch, on any device and in any dtype; the eager reference of the CPU kernels.

Shape legend: T rows of a step, B sequences, n rows of the longest of them, S positions seen by the longest, H heads,
K key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from spec.kv_cache import Span

if TYPE_CHECKING:
    from spec.models.decoder import Plan
    from spec.models.weights import DecoderWeights


@dataclass(frozen=True)
class _Begun:
    cos: Tensor  # [T, 1, D]
    sin: Tensor  # [T, 1, D]
    places: Tensor  # [T] in the pool
    padded: Tensor  # [B, n] row of the step at each place of a rectangle; padding repeats a row
    where: Tensor  # [T] places of the rows in the rectangle, flat
    seen: Tensor  # [B, S] places in the pool; padding points to the sequence's first
    mask: Tensor  # [B, 1, n, S] bool, True where a row looks


class TorchOps:
    """See :class:`spec.models.decoder.Ops`."""

    def __init__(self, weights: DecoderWeights, pool: int, positions: int) -> None:
        self._weights, self._device = weights, weights.embedding.device
        self._dtype, self._size = weights.embedding.dtype, weights.head_size
        self._heads, self._shared = weights.heads, weights.key_heads
        self._cos, self._sin = weights.angles(positions)
        shape = (len(weights.layers), pool, self._shared, self._size)
        self._keys = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._values = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def begin(self, plan: Plan) -> _Begun:
        """See :class:`spec.models.decoder.Ops`."""
        lengths, first_rows = plan.lengths, np.cumsum(plan.lengths) - plan.lengths
        longest, ends = int(lengths.max()), plan.starts + lengths
        padded = first_rows[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
        who = np.repeat(np.arange(len(lengths)), lengths)
        where = who * longest + (np.arange(len(who)) - first_rows[who])
        # Never beyond a sequence's end: what was left there may be NaN, which a mask does not keep out.
        within = np.where(np.arange(ends.max()) < ends[:, None], np.arange(ends.max()), 0)
        seen = np.array([span.start for span in plan.spans])[:, None] + within
        positions = torch.from_numpy(plan.positions).to(self._device)
        rows = torch.from_numpy(padded).to(self._device)
        looks = torch.arange(seen.shape[1], device=self._device) <= positions[rows][..., None]
        return _Begun(
            self._cos[positions][:, None],
            self._sin[positions][:, None],
            positions + torch.from_numpy(plan.firsts).to(self._device),
            rows,
            torch.from_numpy(where).to(self._device),
            torch.from_numpy(seen).to(self._device),
            looks[:, None],
        )

    def embed(self, ids: Tensor) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        return self._weights.embedding[ids.to(self._device)].float()

    def add_norm(self, residual: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        if delta is not None:
            residual += delta
        return self._rms(residual, weight).to(self._dtype)

    def attend(self, layer: int, qkv: Tensor, begun: _Begun) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        mine, keys, values = self._weights.layers[layer], self._keys[layer], self._values[layer]
        split = [self._heads, self._shared, self._shared]
        q, k, v = qkv.view(len(qkv), -1, self._size).split(split, 1)
        keys[begun.places] = self._rotated(k, mine.key_norm, begun).to(self._dtype)
        values[begun.places] = v
        q = self._rotated(q, mine.query_norm, begun).to(self._dtype)[begun.padded]
        attended = functional.scaled_dot_product_attention(
            q.transpose(1, 2), keys[begun.seen].transpose(1, 2), values[begun.seen].transpose(1, 2),
            attn_mask=begun.mask, enable_gqa=True,
        )  # fmt: skip
        return attended.transpose(1, 2).flatten(0, 1)[begun.where].flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate) * up

    def take(self, residual: Tensor, rows: np.ndarray) -> Tensor:
        """See :class:`spec.models.decoder.Ops`."""
        return residual[torch.from_numpy(rows).to(self._device)]

    def copy(self, source: Span, target: Span, tokens: int) -> None:
        """See :class:`spec.models.decoder.Ops`."""
        for cache in (self._keys, self._values):
            cache[:, target.start : target.start + tokens] = cache[:, source.start : source.start + tokens]

    def _rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self._weights.epsilon).rsqrt() * weight

    def _rotated(self, heads: Tensor, norm: Tensor | None, begun: _Begun) -> Tensor:
        """[T, heads, D] float32."""
        x = heads.float()
        if norm is not None:
            x = self._rms(x, norm)
        first, second = x.chunk(2, -1)
        return x * begun.cos + torch.cat([-second, first], -1) * begun.sin
