"""Options of the divergences, and what is refused: every ValueError says what to do instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_Bounds = tuple[float, float, float]
# divergence -> option -> (default, lower bound, upper bound), bounds inclusive; the order is that of names()
_OPTIONS: Mapping[str, Mapping[str, _Bounds]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "jsd": {"beta": (0.5, 0.0, 1.0)},
    "total_variation": {},
    "skew_forward_kl": {"skew": (0.1, 0.0, 1 - 1e-6)},
    "skew_reverse_kl": {"skew": (0.1, 0.0, 1 - 1e-6)},
    "adaptive_kl": {"head_mass": (0.5, 1e-6, 1.0)},
    "kd": {"alpha": (0.5, 0.0, 1.0)},
    "lk_alpha": {},
    "lk_hybrid": {"eta": (3.0, 0.0, math.inf)},
}


_TRUNCATION = ("top_k", "support")  # options of every divergence, beside its own


def names() -> tuple[str, ...]:
    """The divergences there are, as ``per_token``, ``divergence`` and ``chunked`` know them."""
    return tuple(_OPTIONS)


def resolve_options(name: str, options: Mapping[str, Any], temperature: float = 1.0) -> dict[str, float]:
    """The divergence's own options with defaults filled in. ValueError for an unknown name, option or bad value."""
    if name not in _OPTIONS:
        raise ValueError(f"unknown divergence {name!r}; choose one of {', '.join(names())}")
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature must be positive and finite, got {temperature}; greedy has no divergence")
    known = _OPTIONS[name]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{name} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'} (and top_k, support)"
        )
    resolved = {
        option: _number(name, option, options.get(option, default)) for option, (default, _, _) in known.items()
    }
    for option, value in resolved.items():
        _, low, high = known[option]
        if not low <= value <= high:
            raise ValueError(f"{name}: {option} must lie in [{low:g}, {high:g}], got {value}")
    return resolved


def _number(name: str, option: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {option} must be a number, got {value!r}") from error


def checked_options(name: str, options: Mapping[str, Any], temperature: float = 1.0) -> dict[str, Any]:
    """All options to call ``chunked`` with, checked before there is anything to compute.

    The divergence's own with defaults filled in, and ``top_k`` and ``support`` as they are. ValueError for an unknown
    name, option or bad value, and for ``support`` without ``top_k``.
    """
    from onpolicy.losses.divergences import per_token

    truncation = {option: options[option] for option in _TRUNCATION if option in options}
    top_k = truncation.get("top_k")
    if "support" in truncation and top_k is None:
        raise ValueError("support chooses whose top_k tokens are kept and has no effect without it; set top_k too")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool)):
        raise ValueError(f"top_k must be a whole number of tokens, got {top_k!r}; leave it out for the full vocabulary")
    own = {option: value for option, value in options.items() if option not in truncation}
    resolved: dict[str, Any] = resolve_options(name, own, temperature) | truncation
    anything = torch.zeros(1, 4)  # the values of top_k and support are checked where they are used
    per_token(name, anything, anything, token_ids=torch.zeros(1, dtype=torch.int64), **resolved)
    return resolved


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """ValueError unless ``mask`` is boolean and has one entry a token."""
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask must be boolean of shape {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}; use mask.bool()"
        )


def check_token_ids(token_ids: Tensor, vocab: int) -> None:
    """ValueError for an id that the two vocabularies do not share."""
    if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab:
        raise ValueError(
            f"token ids must lie in [0, {vocab}), the rows student and teacher share, got "
            f"[{int(token_ids.min())}, {int(token_ids.max())}]; mask padding, or use models with one tokenizer"
        )


def normaliser(denominator: float | None, tokens: int) -> float:
    """What the summed loss is divided by: the count of tokens unless given. ValueError unless positive."""
    if denominator is None:
        return float(max(tokens, 1))
    if not denominator > 0:
        raise ValueError(
            f"denominator must be positive, got {denominator}; pass the number of tokens of the whole batch"
        )
    return float(denominator)


def required_ids(token_ids: Tensor | None) -> Tensor:
    if token_ids is None:
        raise ValueError("kd compares with hard labels: pass token_ids, or choose forward_kl for the soft part alone")
    return token_ids
