"""The fast forward pass: Llama-like decoders on packed weights, keys and values in one pool.

transformers spends most of a small forward pass between the matrix products; here those take what reading the weights
takes, and what is between them is a handful of compiled kernels on a CPU (spec/models/cpu_ops.py) or plain torch
elsewhere (spec/models/torch_ops.py). The residual stream is float32.

Shape legend: T rows (tokens) of a step, B sequences, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from spec.kv_cache import Pool, Span
from spec.models.base import Step
from spec.models.linear import Linear, Quantization, make_linear

if TYPE_CHECKING:
    from spec.models.weights import DecoderWeights, LayerWeights


@dataclass(frozen=True)
class Plan:
    """Where the rows of a step belong; the same for every layer. Host arrays."""

    spans: list[Span]  # [B]
    starts: np.ndarray  # [B] int64
    lengths: np.ndarray  # [B] int64
    positions: np.ndarray  # [T] int64, in the row's sequence
    firsts: np.ndarray  # [T] int64, where the row's sequence starts in the pool


class Ops(Protocol):
    """What lies between the matrix products; X is how the implementation holds 16-bit rows."""

    def begin(self, plan: Plan) -> Any:
        """What :meth:`attend` needs of a step, computed once."""

    def embed(self, ids: Tensor) -> Any:
        """The residual stream [T, C] float32."""

    def add_norm(self, residual: Any, delta: Tensor | None, weight: Tensor) -> Tensor:
        """Adds ``delta`` [T, C] to the residual stream in place; its RMS norm [T, C]."""

    def attend(self, layer: int, qkv: Tensor, begun: Any) -> Tensor:
        """Stores keys and values of [T, (H + 2 K) D] and returns every row's attention [T, H D]."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 F] -> [T, F]."""

    def take(self, residual: Any, rows: np.ndarray) -> Any:
        """Some rows of the residual stream."""

    def copy(self, source: Span, target: Span, tokens: int) -> None:
        """The first ``tokens`` keys and values of all layers from one span to another."""


class Decoder:
    """A :class:`spec.models.base.LanguageModel` of the Llama family.

    Args:
        weights: from :func:`spec.models.weights.read`.
        quantization: of the matrix products (not the embedding); ``int8`` and ``int4`` on a CPU in bf16. What is
            decoded then is the quantised model, exactly.
        cache_tokens: positions of the key/value pool, shared by all running sequences.
        vocabulary: [V'] int64 target ids; the model then returns logits of these tokens alone, in this order.
    """

    def __init__(
        self,
        weights: DecoderWeights,
        *,
        quantization: Quantization = "none",
        cache_tokens: int = 16384,
        vocabulary: Tensor | None = None,
    ) -> None:
        self.name, self.end_tokens, self.num_parameters = weights.name, weights.end_tokens, weights.num_parameters
        self.device = weights.embedding.device
        self._pool = Pool(cache_tokens)
        self.max_positions = min(weights.max_positions, self._pool.largest)
        head = weights.head if vocabulary is None else weights.head[vocabulary]
        self.vocab_size = len(head)
        self._layers = [_Layer.of(layer, quantization) for layer in weights.layers]
        self._norm, self._head = weights.norm, make_linear(head, quantization=quantization)
        self._ops: Ops = _ops(weights, self._pool.largest, self.max_positions)
        self._spans: dict[int, Span] = {}

    @property
    def cache_usage(self) -> float:
        """See :attr:`spec.models.base.LanguageModel.cache_usage`."""
        return 1 - self._pool.free / self._pool.largest

    def open(self, capacity: int) -> int | None:
        """See :meth:`spec.models.base.LanguageModel.open`."""
        if capacity > self.max_positions:
            raise ValueError(f"{capacity} tokens are more than the {self.max_positions} positions of {self.name}")
        span = self._pool.allocate(capacity)
        if span is None:
            return None
        slot = next(i for i in range(len(self._spans) + 1) if i not in self._spans)
        self._spans[slot] = span
        return slot

    def close(self, slot: int) -> None:
        """See :meth:`spec.models.base.LanguageModel.close`."""
        self._pool.release(self._spans.pop(slot))

    def fork(self, source: int, target: int, tokens: int) -> None:
        """See :meth:`spec.models.base.LanguageModel.fork`."""
        if tokens:
            self._ops.copy(self._spans[source], self._spans[target], tokens)

    @torch.inference_mode()
    def forward(self, step: Step) -> Tensor:
        """See :meth:`spec.models.base.LanguageModel.forward`."""
        begun, ops = self._ops.begin(self._plan(step)), self._ops
        residual = ops.embed(step.token_ids)
        delta: Tensor | None = None
        for i, layer in enumerate(self._layers):
            attended = ops.attend(i, layer.qkv(ops.add_norm(residual, delta, layer.attention_norm)), begun)
            gate_up = layer.gate_up(ops.add_norm(residual, layer.output(attended), layer.mlp_norm))
            delta = layer.down(ops.silu_mul(gate_up))
        assert delta is not None
        wanted = ops.add_norm(ops.take(residual, step.logit_rows), delta[step.logit_rows], self._norm)
        return self._head(wanted).float()

    def _plan(self, step: Step) -> Plan:
        spans = [self._spans[slot] for slot in step.slots.tolist()]
        for span, start, length in zip(spans, step.starts.tolist(), step.lengths.tolist(), strict=True):
            assert start + length <= span.length, "a sequence outgrew the capacity it was opened with"
        ends = np.cumsum(step.lengths)
        within = np.arange(ends[-1]) - np.repeat(ends - step.lengths, step.lengths)
        return Plan(
            spans,
            step.starts,
            step.lengths,
            within + np.repeat(step.starts, step.lengths),
            np.repeat(np.array([span.start for span in spans]), step.lengths),
        )


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor  # [C]
    qkv: Linear
    output: Linear
    mlp_norm: Tensor  # [C]
    gate_up: Linear
    down: Linear

    @classmethod
    def of(cls, weights: LayerWeights, quantization: Quantization) -> _Layer:
        return cls(
            weights.attention_norm,
            make_linear(weights.qkv, weights.qkv_bias, quantization),
            make_linear(weights.output, quantization=quantization),
            weights.mlp_norm,
            make_linear(weights.gate_up, quantization=quantization),
            make_linear(weights.down, quantization=quantization),
        )


def _ops(weights: DecoderWeights, pool: int, positions: int) -> Ops:
    if (
        weights.embedding.device.type == "cpu"
        and weights.embedding.dtype == torch.bfloat16
        and weights.head_size % 16 == 0
    ):
        from spec.models.cpu_ops import CpuOps

        return CpuOps(weights, pool, positions)
    from spec.models.torch_ops import TorchOps

    return TorchOps(weights, pool, positions)
