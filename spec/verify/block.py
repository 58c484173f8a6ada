"""What a verification step is given and what it returns.

Shape legend: B requests, K_b drafted tokens of request b (0 allowed), M = sum K_b, N = M + B target rows, V vocabulary.
Everything is ragged and flat: request b owns K_b consecutive drafted tokens and K_b + 1 consecutive target rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Mode = Literal["token", "block"]
Backend = Literal["auto", "reference", "numba", "torch"]


@dataclass(frozen=True)
class Drafts:
    """A batch of proposals. Example: lengths (2, 0, 1), ids (17, 5, 99), probs [3, V]."""

    ids: Tensor  # [M] int64 drafted tokens
    lengths: Sequence[int]  # [B] K_b; on the host, because shapes follow from it
    probs: Tensor | None = None  # [Q, V] processed draft probabilities; None: every proposal is deterministic
    rows: Tensor | None = None  # [M] int64 row of probs, -1 for a deterministic proposal; None: row m for token m

    def __post_init__(self) -> None:
        if any(length < 0 for length in self.lengths):
            raise ValueError(f"draft lengths {list(self.lengths)}: must be at least 0; use 0 for plain decoding")
        if sum(self.lengths) != len(self.ids):
            raise ValueError(f"{len(self.ids)} drafted tokens, but the draft lengths add up to {sum(self.lengths)}")
        if self.rows is not None and len(self.rows) != len(self.ids):
            raise ValueError(f"rows names {len(self.rows)} draft rows for {len(self.ids)} drafted tokens: one each")
        if self.probs is not None and self.rows is None and len(self.probs) != len(self.ids):
            raise ValueError(
                f"{len(self.probs)} draft rows for {len(self.ids)} drafted tokens: pass `rows` to map them"
            )

    @cached_property
    def host_lengths(self) -> np.ndarray:
        """[B] int64."""
        return np.asarray(self.lengths, dtype=np.int64)

    @cached_property
    def token_starts(self) -> np.ndarray:
        """[B] index of each request's first drafted token; its first target row is ``token_starts[b] + b``."""
        return np.cumsum(self.host_lengths) - self.host_lengths

    @cached_property
    def probs_rows(self) -> Tensor:
        """[M] row of ``probs`` of each drafted token, -1 where the proposal is deterministic."""
        if self.rows is not None:
            return self.rows
        if self.probs is None:
            return torch.full_like(self.ids, -1)
        return torch.arange(len(self.ids), device=self.ids.device)

    def check(self, target: Tensor) -> None:
        """Raises ValueError where the drafts do not fit [N, V] target rows."""
        rows, vocabulary = target.shape
        if rows != len(self.ids) + len(self.lengths):
            raise ValueError(
                f"{rows} target rows for {len(self.ids)} drafted tokens of {len(self.lengths)} requests: a request "
                "needs one row a drafted token and one more"
            )
        if self.probs is not None and self.probs.shape[-1] != vocabulary:
            raise ValueError(
                f"draft rows have {self.probs.shape[-1]} tokens, target rows {vocabulary}: scatter the draft's "
                "probabilities into the target's vocabulary, 0 elsewhere"
            )
        if self.ids.device.type == "cpu":  # elsewhere looking would wait for the device
            outside = self.ids[(self.ids < 0) | (self.ids >= vocabulary)]
            if len(outside):
                raise ValueError(f"drafted token {int(outside[0])} is outside the target's vocabulary of {vocabulary}")


@dataclass(frozen=True)
class Verdicts:
    """What a verification step decided."""

    accepted: Tensor  # [B] int64 tau_b: drafted tokens committed
    tokens: Tensor  # [B] int64 the token committed after them
    accept_probs: Tensor  # [M] float64: a_i (token mode) or h_i (block mode)


def length_law(accept_probs: Tensor, mode: Mode) -> Tensor:
    """The law of tau for one request, [K+1], from its K acceptance probabilities.

    token: tau is the number of accepts before the first rejection; block: the longest prefix that passes.
    """
    one = accept_probs.new_ones(1)
    if mode == "token":
        return torch.cat([one, accept_probs.cumprod(0)]) * torch.cat([1 - accept_probs, one])
    fails_after = torch.cat([(1 - accept_probs).flip(0).cumprod(0).flip(0), one])
    return torch.cat([one, accept_probs]) * fails_after
