"""This project's own engine, every mode and drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from spec.audit.sample import UNKNOWN, Sample
from spec.request import Request
from spec.verify import Mode

if TYPE_CHECKING:
    from spec.engine import Engine


class OurEngine:
    """An :class:`spec.engine.Engine`; end-of-text tokens do not end a completion, so that tokens come in full."""

    unsupported: frozenset[str] = frozenset()

    def __init__(self, engine: Engine, name: str | None = None):
        self.engine = engine
        drafter = "plain" if engine.drafter is None else engine.drafter.name
        self.name = name or f"torch {drafter} {engine.mode}"

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Raises RuntimeError where the engine ends a request with an error."""
        results = self.engine.generate([replace(r, stop_token_ids=(), logprobs=0) for r in requests])
        samples = []
        for request, result in zip(requests, results, strict=True):
            completion = result.completions[0]
            if completion.error is not None:
                raise RuntimeError(f"{self.name}: {completion.error}")
            where = offsets(completion.from_draft, self.engine.mode)
            said = tuple(each.logprob for each in completion.logprobs or ())
            samples.append(Sample(tuple(request.prompt_ids), tuple(completion.token_ids), request.params, where, said))
        return samples


def offsets(from_draft: Sequence[bool], mode: Mode) -> tuple[int, ...]:
    """Position in the block of each token, as far as it is known before the token is.

    A block ends with a token of the target's own. With token-wise verification a token's position says only that the
    drafts before it were accepted, and given that the token still has the target's law. Block verification decides on a
    prefix after looking at what follows: that a block goes on says something of the token there, so only the first
    position, known from the block before, may be told apart.
    """
    found, at = [], 0
    for drafted in from_draft:
        found.append(at if mode == "token" or at == 0 else UNKNOWN)
        at = at + 1 if drafted else 0
    return tuple(found)
