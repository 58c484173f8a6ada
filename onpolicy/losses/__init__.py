"""Losses as pure functions: divergences over the vocabulary, and the same from hidden states in bounded memory."""

from __future__ import annotations

from onpolicy.losses._checks import names
from onpolicy.losses.chunked import chunked, chunked_logprobs, chunked_reduce, iter_logits, iter_logprobs
from onpolicy.losses.divergences import divergence, per_token

__all__ = [
    "chunked",
    "chunked_logprobs",
    "chunked_reduce",
    "divergence",
    "iter_logits",
    "iter_logprobs",
    "names",
    "per_token",
]
