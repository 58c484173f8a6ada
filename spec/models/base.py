"""What the engine asks of a causal language model, target or draft alike.

A model keeps its own KV cache, in *slots* of a fixed capacity. Rolling back is not an operation: the next step says how
many cached tokens of a slot still stand (``starts``) and writes over the rest.

Shape legend: B sequences of a step, T new tokens of all of them, N rows whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One forward pass over several sequences, ragged and flat.

    Example: two sequences, one decoding with two drafts, one in prefill of four tokens of which only the last row's
    logits matter: lengths (3, 4), starts (57, 0), token_ids [7], logit_rows (0, 1, 2, 6).
    """

    token_ids: Tensor  # [T] int64, sequence after sequence
    slots: np.ndarray  # [B] int64
    starts: np.ndarray  # [B] int64 tokens of the slot that stand: the position of the first new token
    lengths: np.ndarray  # [B] int64 new tokens, at least 1
    logit_rows: np.ndarray  # [N] int64 into T, ascending; may be empty


class LanguageModel(Protocol):
    """A causal LM with a KV cache. Not thread-safe: one engine drives it."""

    name: str  # for messages
    vocab_size: int  # V, padding rows of the output matrix included
    max_positions: int  # longest sequence
    end_tokens: tuple[int, ...]  # what ends a text, from the generation config; may be empty
    num_parameters: int  # of every weight, tied ones once; for messages
    device: torch.device

    @property
    def cache_usage(self) -> float:
        """Share of the KV cache that open slots hold, in [0, 1]. May be read from any thread."""

    def open(self, capacity: int) -> int | None:
        """A slot for a sequence of up to ``capacity`` tokens, or None while there is no room.

        Raises ValueError for a capacity that can never be given.
        """

    def close(self, slot: int) -> None:
        """Gives a slot back; its number may be used again."""

    def fork(self, source: int, target: int, tokens: int) -> None:
        """Copies the first ``tokens`` cached tokens of one open slot into another: n samples share one prefill."""

    def forward(self, step: Step) -> Tensor:
        """Caches the new tokens and returns logits [N, V], float32, before any processing.

        The caller may change them in place until the next call.
        """
