"""Is a drafter fit to serve? Asked at start, and of every new draft before it takes over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from spec.drafters.base import Context
from spec.engine import Engine
from spec.params import Params
from spec.request import Completion, Request
from spec.serve.slices import Check, SelfTestFailed, completions, run

if TYPE_CHECKING:
    from spec.drafters.base import Drafter
    from spec.models.base import LanguageModel

_TOKENS = 16
# Greedy texts may part where two tokens tie within rounding; nats, far below what a fault gives.
_TIE = 0.1


def check_drafter(drafter: Drafter, vocabulary: int) -> None:
    """Drafts for a made-up text: ids in the vocabulary, each drawn from a law. Raises SelfTestFailed.

    Touches nothing but the drafter, so that it can run beside an engine that serves.
    """
    prompt = tuple(_prompt(vocabulary))
    context = Context(-1, Params(), prompt, capacity=len(prompt) + 8)
    if not drafter.open(context):
        raise SelfTestFailed(f"{drafter.name} has no room for a text of {context.capacity} tokens")
    try:
        drafts = drafter.propose([context], [4])
    finally:
        drafter.close(context)
    if not all(0 <= id < vocabulary for id in drafts.ids.tolist()):
        raise SelfTestFailed(f"{drafter.name} drafts tokens outside the target's vocabulary of {vocabulary}")
    if drafts.probs is not None:
        sums = drafts.probs.double().sum(-1)
        if not bool(torch.isclose(sums, torch.ones_like(sums), atol=1e-3).all()) or bool((drafts.probs < 0).any()):
            raise SelfTestFailed(f"{drafter.name} gives probabilities that are none: check its weights for NaN")


def check_greedy(target: LanguageModel, drafter: Drafter | None) -> None:
    """The speculative greedy text is the plain one, but for ties. Nobody else may use ``target`` meanwhile.

    Raises SelfTestFailed.
    """
    run(greedy_check(target, drafter))


def greedy_check(target: LanguageModel, drafter: Drafter | None) -> Check[None]:
    """The same in parts (:mod:`spec.serve.slices`)."""
    prompt = _prompt(target.vocab_size)[: max(target.max_positions - _TOKENS, 1)]
    greedy = Request(prompt, Params(temperature=0), _TOKENS, logprobs=2)
    sampled = Request(prompt, Params(top_p=0.9), _TOKENS)  # must run; and what it compiles, no client waits for

    def decoded(drafter: Drafter | None, request: Request) -> Check[Completion]:
        return (yield from completions(Engine(target, drafter, draft_length=3, end_tokens=()), [request]))[0]

    plain = yield from decoded(None, greedy)
    quick = yield from decoded(drafter, greedy)
    yield from decoded(drafter, sampled)
    at = next((i for i in range(len(plain.token_ids)) if plain.token_ids[i] != quick.token_ids[i]), None)
    if at is not None and not _tied(plain, at, quick.token_ids[at]):
        raise SelfTestFailed(
            f"greedy decoding with {drafter.name if drafter else 'no draft'} gives token {quick.token_ids[at]} at "
            f"position {at} where plain decoding gives {plain.token_ids[at]}: not fit to serve; try --dtype float32"
        )


def _tied(plain: Completion, at: int, other: int) -> bool:
    assert plain.logprobs is not None
    chosen = plain.logprobs[at]
    return any(id == other and chosen.logprob - value < _TIE for id, value in chosen.top)


def _prompt(vocabulary: int) -> list[int]:
    """Twelve ids that repeat, so that lookups have something to find."""
    return [(17 * i) % vocabulary for i in range(1, 7)] * 2
