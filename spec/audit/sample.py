"""What an engine under audit is asked for and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from spec.params import Params
from spec.request import Request

UNKNOWN = -1  # position in the block


@dataclass(frozen=True)
class Sample:
    """One completion. Example: prompt (5, 9), tokens (3, 3, 7), offsets (0, 1, 0)."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]  # the stop token included, if one ended it
    params: Params
    # Position of each token in its verification block, where it is known *without* having looked at the token: see
    # spec.audit.engines.ours. None: never known.
    offsets: tuple[int, ...] | None = None
    logprobs: tuple[float, ...] | None = None  # of each token as the engine reports them, nats; None: it does not


def seeded(seed: int) -> bool:
    """Whether an engine that also draws from a random state of its own is to be given this seed.

    Two requests in a row are (the two of one prompt and setting), the next two are not: both paths are audited.
    """
    return seed % 4 in (1, 2)


class EngineUnderAudit(Protocol):
    """Anything that completes prompts. ``generate`` answers each request once, in order; ``n`` is always 1."""

    name: str
    unsupported: frozenset[str]  # fields of Params that the engine refuses

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Raises whatever the engine raises: an engine that fails is not judged."""
