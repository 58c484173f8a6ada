"""Is a value of the type that its field needs? Said in words a caller without a type checker can act on."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Collection
from typing import Any


def need_integer(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a whole number: of Python, numpy or torch, but no bool."""
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: must be a whole number") from None
    if isinstance(value, bool):
        raise ValueError(f"{name}={value}: must be a whole number")


def need_number(name: str, value: Any) -> None:
    """ValueError unless ``value`` is a number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be a number")


def need_token_ids(name: str, ids: Any) -> None:
    """ValueError unless ``ids`` is a collection of whole numbers."""
    if isinstance(ids, str) or not isinstance(ids, Collection):
        raise ValueError(f"{name}={ids!r}: must be token ids, for example (1, 2)")
    for token in ids:
        need_integer(f"{name}: token", token)
