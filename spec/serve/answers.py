"""What goes back to clients: OpenAI's objects, whole or in chunks, for completions and chats."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from spec.request import Completion, Event, Result, TokenLogprob
from spec.serve.texts import Texts

Json = dict[str, Any]
_LEAST = -9999.0  # for log-probs of -inf, which JSON does not have; vLLM's number


@dataclass(frozen=True)
class Shown:
    """vLLM's two options on token ids."""

    token_ids: bool = False  # every choice says which tokens it is made of, the one that stopped it included
    names_are_ids: bool = False  # in log-probs "token_id:7" stands for the token's text


class Answer(Protocol):
    """How an endpoint writes choices. ``index`` counts all choices of the call: sample i of prompt p is p n + i."""

    object: str  # of a whole answer
    chunk_object: str

    async def choice(self, index: int, prompt: int, completion: Completion) -> Json:
        """One finished choice."""

    async def delta(self, index: int, prompt: int, events: Sequence[Event]) -> Json | None:
        """What some tokens, one at least, add to a stream; None where that is nothing that shows."""


@dataclass
class Head:
    """The fields around the choices."""

    model: str
    prefix: str  # of the id
    fingerprint: str
    id: str = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"

    def around(self, kind: str, choices: Sequence[Json]) -> Json:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "choices": list(choices),
        }  # fmt: skip


class CompletionAnswer:
    """/v1/completions. ``echoes``: a text for each prompt, before its answers."""

    object = chunk_object = "text_completion"

    def __init__(self, texts: Texts, echoes: Sequence[str], shown: Shown):
        self._texts, self._echoes, self._shown = texts, echoes, shown
        self._offsets: dict[int, int] = {}  # where the text of a streamed choice's next token begins

    async def choice(self, index: int, prompt: int, completion: Completion) -> Json:
        echo = self._echoes[prompt]
        logprobs, _ = await self._logprobs(completion.logprobs, len(echo))
        choice = self._choice(index, echo + completion.text, completion.finish_reason, logprobs)
        return choice | _ids(self._shown, completion.token_ids)

    async def delta(self, index: int, prompt: int, events: Sequence[Event]) -> Json | None:
        echo = "" if index in self._offsets else self._echoes[prompt]
        offset = self._offsets.setdefault(index, len(echo))
        text = echo + _text(events)
        if not (text or _shows(events, self._shown)):
            return None
        logprobs, self._offsets[index] = await self._logprobs(_values(events), offset)
        return self._choice(index, text, events[-1].finish_reason, logprobs) | _ids(self._shown, _of(events))

    @staticmethod
    def _choice(index: int, text: str, reason: str | None, logprobs: Json | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    async def _logprobs(self, values: Sequence[TokenLogprob] | None, offset: int) -> tuple[Json | None, int]:
        """And where the next token's text begins. By tokens: some texts show later, with those of the next ones."""
        if values is None:
            return None, offset
        texts, offsets = await _names(self._texts, values), []
        for value in values:
            offsets.append(offset)
            offset += len(texts[value.token_id])
        name = _naming(self._shown, texts)
        found = {
            "tokens": [name(value.token_id) for value in values],
            "token_logprobs": [max(value.logprob, _LEAST) for value in values],
            "top_logprobs": [
                {name(id): max(logprob, _LEAST) for id, logprob in (*value.top, (value.token_id, value.logprob))}
                for value in values
            ],
            "text_offset": offsets,
        }
        return found, offset


class ChatAnswer:
    """/v1/chat/completions."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, texts: Texts, shown: Shown):
        self._texts, self._shown = texts, shown
        self._begun: set[int] = set()

    async def choice(self, index: int, prompt: int, completion: Completion) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": await self._logprobs(completion.logprobs),
            "finish_reason": completion.finish_reason,
            **_ids(self._shown, completion.token_ids),
        }

    async def delta(self, index: int, prompt: int, events: Sequence[Event]) -> Json | None:
        delta: Json = {} if index in self._begun else {"role": "assistant", "content": ""}
        text = _text(events)
        if not (delta or text or _shows(events, self._shown)):
            return None
        self._begun.add(index)
        if text:
            delta["content"] = text
        logprobs = await self._logprobs(_values(events))
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": events[-1].finish_reason}
        return choice | _ids(self._shown, _of(events))

    async def _logprobs(self, values: Sequence[TokenLogprob] | None) -> Json | None:
        if values is None:
            return None
        texts = await _names(self._texts, values)
        name = _naming(self._shown, texts)

        def one(id: int, logprob: float) -> Json:
            return {"token": name(id), "logprob": max(logprob, _LEAST), "bytes": list(texts[id].encode())}

        content = [
            {**one(value.token_id, value.logprob), "top_logprobs": [one(id, logprob) for id, logprob in value.top]}
            for value in values
        ]
        return {"content": content, "refusal": None}


def _shows(events: Sequence[Event], shown: Shown) -> bool:
    """Whether tokens are to be told of though they add no text."""
    told = shown.token_ids and any(event.token_id is not None for event in events)
    return told or events[-1].finish_reason is not None or any(event.logprob for event in events)


def _text(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events)


def _values(events: Sequence[Event]) -> list[TokenLogprob] | None:
    """None where no log-probs were asked for."""
    return [event.logprob for event in events if event.logprob is not None] or None


def _of(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def _ids(shown: Shown, token_ids: Sequence[int]) -> Json:
    return {"token_ids": list(token_ids)} if shown.token_ids else {}


async def _names(texts: Texts, values: Sequence[TokenLogprob]) -> Mapping[int, str]:
    return await texts.names(id for value in values for id in (value.token_id, *(id for id, _ in value.top)))


def _naming(shown: Shown, texts: Mapping[int, str]) -> Callable[[int], str]:
    return "token_id:{}".format if shown.names_are_ids else texts.__getitem__


def usage(results: Sequence[Result]) -> Json:
    """Tokens in and out; a prompt counts once, however many samples share it."""
    prompt = sum(len(result.request.prompt_ids) for result in results)
    completion = sum(len(c.token_ids) for result in results for c in result.completions)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def facts(results: Sequence[Result]) -> Json:
    """What speculation did for a call: the ``metrics`` field. Positions count from 0 within a block of drafts."""
    completions = [completion for result in results for completion in result.completions]
    tokens, steps = sum(len(c.token_ids) for c in completions), sum(c.target_steps for c in completions)
    firsts = [r.seconds_to_first_token for r in results if r.seconds_to_first_token is not None]
    return {
        "choices": [
            {
                "tokens": len(completion.token_ids),
                "target_steps": completion.target_steps,
                "drafted": sum(completion.drafted),
                "accepted": sum(completion.accepted),
                "drafted_by_position": completion.drafted,
                "accepted_by_position": completion.accepted,
            }
            for completion in completions
        ],
        "tokens_per_target_step": tokens / steps if steps else None,
        "seconds_to_first_token": min(firsts, default=None),
        "seconds": max((result.seconds for result in results), default=0.0),
    }
