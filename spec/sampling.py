"""Logits to processed probabilities: the one definition for target, draft, accept, residual and bonus rows.

Shape legend: N rows (any leading shape is allowed), V vocabulary, L padded history length.

Order, which is vLLM's V1 sampler's:

1. allowed-token mask, 2. logit bias, 3. repetition penalty (prompt and output), frequency and presence
penalties (output only), 4. temperature, 5. min-p, 6. top-k, 7. top-p, 8. renormalisation.

transformers agrees on bias -> repetition -> temperature -> top-k -> top-p. Where the two differ, or leave
something open, this module does the following.

- *min-p* comes before top-k and top-p (vLLM), not last (transformers). It commutes with top-k; with top-p it
  does not: the nucleus is then taken of the min-p survivors, renormalised. vLLM is followed because rollouts and
  served text come from it.
- *allowed tokens* first (vLLM) or after the penalties (transformers): the same result, a mask commutes with both.
- *top-k ties*: every token as probable as the k-th is kept, as in both.
- *top-p boundary*: a token is kept iff the mass of strictly more probable tokens is below ``top_p`` (both drop a
  token when the mass from the bottom up to it is <= 1 - top_p, the same rule). Tokens tied with the last one kept
  are all kept; in both libraries which of them survive depends on the sort, so their result is not a function of
  the probabilities. Ties are common with bfloat16 logits.
- *temperature* below ``GREEDY_BELOW`` is greedy, as in vLLM: one-hot at the argmax of the logits after steps
  1-3, the lowest id on ties.
- *-inf logits* are tokens that cannot be drawn (padded vocabulary, grammar); NaN, +inf and a row without any
  finite logit raise :class:`NonFiniteLogits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spec.params import GREEDY_BELOW, Params, row_options
from spec.sampling_kernels import Backend, drop_below, kept_floor

__all__ = [
    "GREEDY_BELOW",
    "NonFiniteLogits",
    "Params",
    "adjusted_logits",
    "check_finite",
    "processed_logprobs",
    "processed_probs",
    "row_options",
]


class NonFiniteLogits(ValueError):
    """A model returned NaN, +inf, or nothing but -inf; ``rows`` are the flat indices of the offending rows."""

    def __init__(self, name: str, rows: list[int], positions: Sequence[int] | None = None):
        self.rows = rows
        places = [f"row {row}" + (f" (position {positions[row]})" if positions is not None else "") for row in rows[:8]]
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        super().__init__(
            f"{name}: non-finite logits in {', '.join(places)}{more}. Check the weights for NaN, try float32, or "
            "widen the allowed tokens if a mask left none."
        )


def processed_logprobs(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    prompt_ids: Tensor | None = None,
    output_ids: Tensor | None = None,
    logit_bias: Tensor | Mapping[int, float] | None = None,
    allowed: Tensor | None = None,
    name: str = "model",
    check: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Log-probabilities of the distribution that is sampled from, [*, V], nats, -inf outside the kept set.

    Args:
        logits: [*, V], any float dtype. The result is float64 for float64 logits and float32 otherwise.
        temperature, top_k, top_p, min_p and the penalties: numbers, or tensors broadcastable to ``logits.shape[:-1]``.
        prompt_ids, output_ids: [*, L] int64 history of each row, padded with -1; the penalties read them.
        logit_bias: [V] or [*, V], or token id -> bias for every row.
        allowed: [V] or [*, V] bool, True where the token may be drawn.
        name: of the model, for error messages.
        check: whether to look for non-finite logits (on a GPU this waits for the device).
        backend: how the kept set is found: ``numba`` (CPU, no sort), ``torch`` (sorts; the reference), or by device.

    Differentiable with respect to ``logits``; the kept set is treated as a constant.

    Raises:
        NonFiniteLogits: naming ``name`` and the rows.
        ValueError: for penalties without a history.
    """
    scores = adjusted_logits(
        logits, repetition_penalty, presence_penalty, frequency_penalty, prompt_ids, output_ids, logit_bias, allowed
    )
    if check:
        check_finite(scores, name=name, temperature=temperature)
    return _shaped(scores, (temperature, top_k, top_p, min_p), backend, log=True)


def processed_probs(logits: Tensor, *, name: str = "model", check: bool = True, **options: Any) -> Tensor:
    """Probabilities of the same distribution, [*, V]; same arguments and errors as :func:`processed_logprobs`."""
    temperature, top_k, top_p, min_p = (options.pop(key, off) for key, off in _OFF.items())
    backend = options.pop("backend", "auto")
    scores = adjusted_logits(logits, **options)
    if check:
        check_finite(scores, name=name, temperature=temperature)
    return _shaped(scores, (temperature, top_k, top_p, min_p), backend, log=False)


_OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def adjusted_logits(
    logits: Tensor,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    prompt_ids: Tensor | None = None,
    output_ids: Tensor | None = None,
    logit_bias: Tensor | Mapping[int, float] | None = None,
    allowed: Tensor | None = None,
) -> Tensor:
    """Steps 1 to 3: mask, bias and penalties, in float32 (float64 for float64 logits), [*, V]. Pure."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if logit_bias is not None and len(logit_bias):
        scores = scores + _bias(logit_bias, scores)
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    given = {"repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty}
    given["frequency_penalty"] = frequency_penalty
    active = {key: value for key, value in given.items() if isinstance(value, Tensor) or value != neutral[key]}
    if not active:
        return scores
    if prompt_ids is None and output_ids is None:
        raise ValueError(f"{', '.join(active)} needs the tokens so far: pass prompt_ids and output_ids, padded with -1")
    return _penalised(scores, active, prompt_ids, output_ids)


def _penalised(
    scores: Tensor, active: Mapping[str, float | Tensor], prompt_ids: Tensor | None, output_ids: Tensor | None
) -> Tensor:
    """A history names few tokens of the vocabulary: only those are looked at, each once a row."""
    rows, vocabulary = scores.shape[:-1], scores.shape[-1]
    said = _places(output_ids, rows, vocabulary, scores.device)
    places, inverse = torch.cat([said, _places(prompt_ids, rows, vocabulary, scores.device)]).unique(
        return_inverse=True
    )
    counts = torch.zeros(len(places), dtype=scores.dtype, device=scores.device)
    counts.index_add_(0, inverse[: len(said)], torch.ones_like(said, dtype=scores.dtype))
    row = places // vocabulary
    setting = {name: _per_row(value, rows, scores).reshape(-1)[row] for name, value in active.items()}
    flat = scores.reshape(-1)
    values = flat[places]
    if "repetition_penalty" in setting:
        factor = setting["repetition_penalty"]
        values = torch.where(values > 0, values / factor, values * factor)
    if "frequency_penalty" in setting:
        values = values - setting["frequency_penalty"] * counts
    if "presence_penalty" in setting:
        values = values - setting["presence_penalty"] * (counts > 0)
    return flat.index_put((places,), values).reshape(scores.shape)


def _places(ids: Tensor | None, rows: torch.Size, vocabulary: int, device: torch.device) -> Tensor:
    """[P] row * V + id of each token of each row's history [*, L]; ids outside the vocabulary are padding."""
    if ids is None:
        return torch.zeros(0, dtype=torch.long, device=device)
    flat = ids.expand(*rows, ids.shape[-1]).reshape(rows.numel(), ids.shape[-1])
    row, at = ((flat >= 0) & (flat < vocabulary)).nonzero(as_tuple=True)
    return row * vocabulary + flat[row, at]


def check_finite(
    scores: Tensor,
    *,
    name: str = "model",
    positions: Sequence[int] | None = None,
    temperature: float | Tensor = 1.0,
) -> None:
    """Raises :class:`NonFiniteLogits` where a row holds NaN or +inf, or only -inf, before or after ``temperature``."""
    bad = ~scaled_top(scores, temperature).isfinite()
    if bool(bad.any()):
        raise NonFiniteLogits(name, bad.reshape(-1).nonzero().flatten().tolist(), positions)


def scaled_top(scores: Tensor, temperature: float | Tensor) -> Tensor:
    """[*] each row's largest score after temperature (greedy rows have none): finite only where the law is one."""
    heat = torch.as_tensor(temperature, dtype=scores.dtype, device=scores.device)
    return scores.amax(-1) / heat.masked_fill(heat < GREEDY_BELOW, 1.0)


def _shaped(scores: Tensor, settings: _Settings, backend: Backend, log: bool) -> Tensor:
    """Steps 4 to 8, [*, V] -> [*, V]; on a CPU a few rows at a time, so that they stay in its cache."""
    if scores.device.type != "cpu" or (scores.requires_grad and torch.is_grad_enabled()):
        return _shaped_rows(scores, settings, backend, log)
    flat = scores.reshape(-1, scores.shape[-1])
    cached = max(1, _CACHED // scores.shape[-1])
    out = torch.empty(flat.shape, dtype=scores.dtype)
    for alike, members in _alike(settings, scores.shape[:-1]):
        for start in range(0, len(members), cached):
            few = members[start : start + cached]
            # consecutive rows are read where they are
            index = slice(few[0], few[-1] + 1) if few[-1] - few[0] == len(few) - 1 else few
            out[index] = _shaped_rows(flat[index], alike, backend, log)
    return out.reshape(scores.shape)


def _alike(settings: _Settings, rows: torch.Size) -> Iterable[tuple[_Settings, Sequence[int]]]:
    """Settings as numbers, and the flat rows that share them, ascending: a step that they switch off is skipped."""
    everything = range(rows.numel())
    if not any(isinstance(x, Tensor) for x in settings):
        return [(settings, everything)]
    columns = [
        x.expand(rows).reshape(-1).tolist() if isinstance(x, Tensor) else [x] * len(everything) for x in settings
    ]
    groups: dict[_Settings, list[int]] = {}
    for row, alike in enumerate(zip(*columns, strict=True)):
        groups.setdefault(alike, []).append(row)
    return groups.items()


_Settings = tuple[float | Tensor, float | Tensor, float | Tensor, float | Tensor]  # temperature, top_k, top_p, min_p
_CACHED = 4 * 49152  # logits


def _shaped_rows(scores: Tensor, settings: _Settings, backend: Backend, log: bool) -> Tensor:
    temperature, top_k, top_p, min_p = settings
    rows = scores.shape[:-1]
    if not isinstance(temperature, Tensor):
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature}: must be at least 0; use 0 for greedy decoding")
        if temperature < GREEDY_BELOW:
            return _one_hot(scores, log)
        scaled = scores if temperature == 1 else scores / temperature
    else:
        heat = _per_row(temperature, rows, scores)[..., None]
        greedy = heat < GREEDY_BELOW
        scaled = scores / heat.masked_fill(greedy, 1.0)
    floor = kept_floor(scaled.detach(), top_k, top_p, min_p, backend)
    if floor is not None:
        scaled = drop_below(scaled, floor)
    shaped = scaled.log_softmax(-1) if log else scaled.softmax(-1)
    return torch.where(greedy, _one_hot(scores, log), shaped) if isinstance(temperature, Tensor) else shaped


def _one_hot(scores: Tensor, log: bool) -> Tensor:
    """All mass on the argmax, the lowest id on ties (``torch.argmax`` documents the first)."""
    off, on = (-torch.inf, 0.0) if log else (0.0, 1.0)
    return torch.full_like(scores, off).scatter(-1, scores.argmax(-1, keepdim=True), on)


def _per_row(value: float | Tensor, rows: torch.Size, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).expand(rows)


def _bias(bias: Tensor | Mapping[int, float], like: Tensor) -> Tensor:
    if isinstance(bias, Tensor):
        return bias.to(like)
    dense = torch.zeros(like.shape[-1], dtype=like.dtype, device=like.device)
    dense[list(bias)] = torch.tensor(list(bias.values()), dtype=like.dtype, device=like.device)
    return dense
