"""What shapes one request's distribution, and a batch of such requests as arguments of :mod:`spec.sampling`.

Shape legend: N rows, V vocabulary, L padded history length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spec.field_types import need_integer, need_number, need_token_ids

if TYPE_CHECKING:
    import torch

GREEDY_BELOW = 1e-5  # temperatures below are greedy: vLLM's _SAMPLING_EPS
LEAST_REPETITION_PENALTY = 0.01  # logits are divided by it: far smaller ones leave float32


@dataclass(frozen=True)
class Params:
    """What shapes one request's distribution. Defaults sample from the model's own.

    Raises ValueError, naming the remedy, for a value of another type or outside its range.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 or -1 keeps the whole vocabulary
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1]: floor relative to the most probable token
    repetition_penalty: float = 1.0  # >= 0.01; above 1 discourages tokens of prompt and output
    presence_penalty: float = 0.0  # subtracted once from a token of the output
    frequency_penalty: float = 0.0  # subtracted once per occurrence in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added logit
    allowed_token_ids: tuple[int, ...] | None = None  # None allows all
    seed: int = 0  # of the request's random streams, see spec.random

    def __post_init__(self) -> None:
        def need(holds: bool, name: str, remedy: str) -> None:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)!r}: {remedy}")

        self._check_types()
        finite = math.isfinite
        need(
            finite(self.temperature) and self.temperature >= 0,
            "temperature",
            "must be finite and at least 0; use 0 for greedy decoding",
        )
        need(self.top_k >= -1, "top_k", "must be positive, or 0 to keep the whole vocabulary")
        need(0 < self.top_p <= 1, "top_p", "must be in (0, 1]; use 1 to switch it off, temperature=0 for greedy")
        need(0 <= self.min_p <= 1, "min_p", "must be in [0, 1]; use 0 to switch it off")
        need(
            finite(self.repetition_penalty) and self.repetition_penalty >= LEAST_REPETITION_PENALTY,
            "repetition_penalty",
            f"must be at least {LEAST_REPETITION_PENALTY}; use 1 to switch it off",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            need(finite(getattr(self, name)), name, "must be finite; use 0 to switch it off")
        need(
            all(finite(bias) or bias == -math.inf for bias in self.logit_bias.values()),
            "logit_bias",
            "every bias must be finite, or -inf to forbid a token",
        )
        need(
            self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
            "allowed_token_ids",
            "must name at least one token, or be None to allow all",
        )
        need(-(2**63) <= self.seed < 2**64, "seed", "must fit in 64 bits")

    def _check_types(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            need_number(name, getattr(self, name))
        for name in ("top_k", "seed"):
            need_integer(name, getattr(self, name))
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias={self.logit_bias!r}: must be a mapping from token id to bias")
        for token, bias in self.logit_bias.items():
            need_integer("logit_bias: token", token)
            need_number(f"logit_bias of token {token}", bias)
        if self.allowed_token_ids is not None:
            need_token_ids("allowed_token_ids", self.allowed_token_ids)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        """Whether the distribution depends on which tokens came before, beyond the model's own context."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, size: int) -> None:
        """Raises ValueError if ``logit_bias`` or ``allowed_token_ids`` names a token outside ``range(size)``."""
        for name, ids in (("logit_bias", self.logit_bias), ("allowed_token_ids", self.allowed_token_ids or ())):
            outside = [token for token in ids if not 0 <= token < size]
            if outside:
                raise ValueError(f"{name} names token {outside[0]}, outside the vocabulary of {size}: remove it")


def row_options(
    params: Sequence[Params],
    vocabulary: int,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Keyword arguments for :func:`spec.sampling.processed_probs` on [N, V] rows of different requests.

    Args:
        params: [N], one a row (a request with K drafts has K + 1 rows, all with its own).
        prompts, outputs: [N] token ids before each row's token; row i of a draft has i drafted tokens at the end of its
            output. Read only for rows with penalties; may be None where no row has any.

    A setting that is off in every row is left out, one that all rows share stays a number: both are cheaper.
    Raises ValueError for penalties without a history.
    """
    import torch

    options: dict[str, Any] = {}
    for name, neutral in _NEUTRAL.items():
        values = [_setting(row, name) for row in params]
        if any(value != neutral for value in values):
            shared = all(value == values[0] for value in values)
            dtype = torch.float64 if name == "top_p" else None  # the smallest are 0 in float32, which is no nucleus
            options[name] = values[0] if shared else torch.tensor(values, dtype=dtype, device=device)
    if any(row.penalised for row in params):
        if prompts is None or outputs is None:
            raise ValueError("penalties need the tokens so far: pass prompts and outputs")
        for name, history in (("prompt_ids", prompts), ("output_ids", outputs)):
            options[name] = _padded(
                [ids if row.penalised else () for row, ids in zip(params, history, strict=True)], device
            )
    if any(row.logit_bias for row in params):
        places = [(i, token) for i, row in enumerate(params) for token in row.logit_bias]
        values = [bias for row in params for bias in row.logit_bias.values()]
        options["logit_bias"] = torch.sparse_coo_tensor(
            torch.tensor(places).T, torch.tensor(values, dtype=torch.float32), (len(params), vocabulary),
            device=device, check_invariants=False,
        )  # fmt: skip
    if any(row.allowed_token_ids is not None for row in params):
        allowed = torch.ones(len(params), vocabulary, dtype=torch.bool)
        for i, row in enumerate(params):
            if row.allowed_token_ids is not None:
                allowed[i] = False
                allowed[i, list(row.allowed_token_ids)] = True
        options["allowed"] = allowed.to(device)
    return options


_NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


def _setting(row: Params, name: str) -> float:
    """A temperature just below the greedy limit need not be below it in float32: 0 is."""
    value: float = getattr(row, name)
    return 0.0 if name == "temperature" and row.greedy else value


def _padded(histories: Sequence[Sequence[int]], device: torch.device | str) -> torch.Tensor:
    """[N, L] int64, padded with -1."""
    import torch

    longest = max(len(ids) for ids in histories)
    return torch.tensor([[*ids, *[-1] * (longest - len(ids))] for ids in histories], dtype=torch.long, device=device)
