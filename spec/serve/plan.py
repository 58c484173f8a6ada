"""From what a client sent to what the engine runs, checked to the end before anything is queued."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spec.params import Params
from spec.request import Request
from spec.serve.errors import ApiError
from spec.serve.protocol import ChatRequest, CompletionRequest, Sampling

if TYPE_CHECKING:
    from spec.constraint import Grammar
    from spec.serve.texts import Texts

# Under an adaptive draft length the text of a seed depends on timing; at any fixed length it does not.
SEEDED_DRAFT_LENGTH = 2  # loses less than 4 where the server is full (benchmarks/LOG.md)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    vocabulary: int
    context: int  # tokens of prompt and output together
    default_tokens: int  # output of a chat that names no max_tokens
    samples: int  # choices of one call
    end_tokens: tuple[int, ...]  # what ends a text by itself
    adaptive: bool  # the server's draft length is not a fixed number


async def completion_requests(body: CompletionRequest, texts: Texts, limits: Limits) -> tuple[list[Request], list[str]]:
    """One engine request a prompt, and what to echo before each prompt's answers.

    Raises ApiError, with the remedy, for what cannot run.
    """
    _check_samples(_count(body.prompt) * (body.n or 1), limits)  # before thousands of prompts are tokenised
    prompts, grammar = await _prompts(body, texts), await texts.grammar(body.constraint())
    requests = [_request(body, ids, body.max_tokens or 16, body.logprobs, grammar, limits) for ids in prompts]
    if not body.echo:
        return requests, [""] * len(requests)
    if isinstance(body.prompt, str):
        return requests, [body.prompt]
    given = [part for part in body.prompt if isinstance(part, str)]
    return requests, given or [await texts.decode(ids) for ids in prompts]


async def chat_requests(body: ChatRequest, texts: Texts, limits: Limits) -> list[Request]:
    """The one engine request of a conversation. Raises ApiError, with the remedy, for what cannot run."""
    _check_samples(body.n or 1, limits)
    ids, grammar = await texts.encode_chat(body.messages), await texts.grammar(body.constraint())
    room = max(limits.context - len(ids), 1)
    tokens = body.max_completion_tokens or body.max_tokens or min(limits.default_tokens, room)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return [_request(body, ids, tokens, logprobs, grammar, limits)]


async def _prompts(body: CompletionRequest, texts: Texts) -> list[list[int]]:
    prompt, special = body.prompt, body.add_special_tokens is not False
    if isinstance(prompt, str):
        return [await texts.encode(prompt, special)]
    if not prompt:
        raise ApiError(400, "prompt: is empty; give a text, token ids, or a list of either", param="prompt")
    if isinstance(prompt[0], int):
        return [[id for id in prompt if isinstance(id, int)]]
    return [
        await texts.encode(part, special) if isinstance(part, str) else list(part)
        for part in prompt
        if not isinstance(part, int)
    ]


def _request(
    body: Sampling, ids: Sequence[int], max_tokens: int, logprobs: int | None, grammar: Grammar | None, limits: Limits
) -> Request:
    if len(ids) + max_tokens > limits.context:
        raise ApiError(
            400,
            f"prompt ({len(ids)} tokens) and max_tokens ({max_tokens}) together pass the context of {limits.context}: "
            "shorten the prompt or ask for fewer tokens",
            param="messages" if isinstance(body, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    request = Request(
        ids,
        _params(body),
        max_tokens,
        stop,
        _stop_tokens(body, limits),
        body.n or 1,
        logprobs,
        _draft_length(body, limits),
        special_tokens=body.skip_special_tokens is False,
        grammar=grammar,
    )
    try:
        request.check(limits.vocabulary, limits.context)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
    return request


def _params(body: Sampling) -> Params:
    """A request without a seed gets one of its own: equal seeds would give equal texts."""

    def or_default(value: float | None, default: float) -> float:
        return default if value is None else value

    try:
        return Params(
            temperature=or_default(body.temperature, 1.0),
            top_k=body.top_k or 0,
            top_p=or_default(body.top_p, 1.0),
            min_p=or_default(body.min_p, 0.0),
            repetition_penalty=or_default(body.repetition_penalty, 1.0),
            presence_penalty=or_default(body.presence_penalty, 0.0),
            frequency_penalty=or_default(body.frequency_penalty, 0.0),
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            allowed_token_ids=tuple(body.allowed_token_ids) if body.allowed_token_ids else None,
            seed=secrets.randbits(63) if body.seed is None else body.seed,
        )
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _stop_tokens(body: Sampling, limits: Limits) -> tuple[int, ...]:
    """The client's own come on top of the model's."""
    return (*(body.stop_token_ids or ()), *(() if body.ignore_eos else limits.end_tokens))


def _draft_length(body: Sampling, limits: Limits) -> int | None:
    if body.draft_length is None and body.seed is not None and limits.adaptive:
        return SEEDED_DRAFT_LENGTH
    return body.draft_length


def _count(prompt: str | Sequence[object]) -> int:
    """How many prompts these are: a text or a list of token ids is one."""
    return 1 if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int) else len(prompt)


def _check_samples(samples: int, limits: Limits) -> None:
    if samples > limits.samples:
        raise ApiError(400, f"{samples} choices: at most {limits.samples} in one call; send several calls", param="n")
