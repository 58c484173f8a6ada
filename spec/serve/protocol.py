"""What clients send: OpenAI's fields, vLLM's sampling extensions, and two of ours (``draft_length``, ``metrics``).

A field that would change the answer and is not supported is refused, never dropped; one that could not change it
(``user``, ``metadata`` …) is let through.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from spec.params import LEAST_REPETITION_PENALTY
from spec.serve.constrained import ResponseFormat, Schema, StructuredOutputs, Wanted, wanted

_WITHOUT_EFFECT = frozenset(
    (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "parallel_tool_calls", "request_id", "priority", "cache_salt",
    )
)  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_TOOLS = "are not supported; ask for JSON with response_format, and describe it in the messages"
_NOT_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {  # field -> values that ask for nothing, and the refusal
    "guided_grammar": ((), "not supported; use a JSON schema, a regular expression or a choice"),
    "tools": (([],), f"tools {_NO_TOOLS}"),
    "functions": (([],), f"functions {_NO_TOOLS}"),
    "tool_choice": (("none", "auto"), "there are no tools to choose from; remove it"),
    "function_call": (("none", "auto"), "there are no functions to call; remove it"),
    "modalities": ((["text"],), "only text comes out; remove it"),
    "audio": ((), "only text comes out; remove it"),
    "prediction": ((), "not supported; drafts come from the server's own drafter"),
    "reasoning_effort": (("none",), "not supported; put it into the messages"),
    "suffix": (("",), "insertion is not supported; put all of the context into the prompt"),
    "min_tokens": ((0,), "not supported; it would have to be part of drafting and verification"),
    "use_beam_search": ((False,), "texts are sampled, not searched for; remove it"),
    "length_penalty": ((1,), "texts are sampled, not searched for; remove it"),
    "include_stop_str_in_output": ((False,), "the text ends before what stopped it; remove it"),
    "spaces_between_special_tokens": ((True,), "the tokenizer decides on spaces; remove it"),
    "truncate_prompt_tokens": ((), "prompts are never cut; send the part that counts"),
    "prompt_logprobs": ((), "log-probs of the prompt are not available; remove it"),
    "bad_words": (([],), "not supported; forbid tokens with logit_bias"),
    "logits_processors": (([],), "not supported; nothing of a client's runs here"),
    "chat_template_kwargs": (({},), "the model's own chat template takes no options here; remove it"),
    "continue_final_message": ((False,), "not supported; send the whole text to /v1/completions"),
    "add_generation_prompt": ((True,), "an answer always begins a message; send token ids to /v1/completions"),
    "documents": (([],), "not supported; put them into the messages"),
    "chat_template": ((), "the model's own chat template is used; send token ids to /v1/completions for another"),
}

_MOST_IDS = 65_536  # in logit_bias and allowed_token_ids
_LONGEST_DRAFT = 16  # each draft is a row of logits as long as the vocabulary, for every sequence that runs
Text = Annotated[str, StringConstraints(max_length=4_000_000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]  # true is no token


class Strict(BaseModel):
    """Unknown fields are errors; NaN and infinity are no numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _encodable(cls, value: Any) -> Any:
        """Half a surrogate pair is valid JSON and no text."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and _SURROGATE.search(text):
                raise ValueError("a lone surrogate is no character; send valid Unicode")
        return value


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class Sampling(Strict):
    """What both endpoints share. ``None`` stands for the default everywhere, as clients send it."""

    model: str | None = Field(None, max_length=1000)
    n: int | None = Field(None, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=LEAST_REPETITION_PENALTY, le=100)
    # "05" would be another key for 5: of two biases for one token, which one counts?
    logit_bias: dict[Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})$")], float] | None = Field(
        None, max_length=_MOST_IDS
    )
    allowed_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=_MOST_IDS)
    stop: Text | list[Text] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=128)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    draft_length: int | None = Field(
        None, ge=0, le=_LONGEST_DRAFT, description="Tokens to draft a step; 0: plain decoding"
    )
    metrics: bool | None = Field(None, description="Report what speculation did for this request")
    return_token_ids: bool | None = Field(None, description="Every choice says which tokens it is made of")
    return_tokens_as_token_ids: bool | None = Field(None, description="Log-probs name tokens as token_id:7")
    skip_special_tokens: bool | None = Field(None, description="false: special tokens show in the text")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        """Refuses what is known and not supported, with the reason; drops what asks for nothing."""
        if not isinstance(data, dict):
            return data
        for name, (neutral, reason) in _NOT_SUPPORTED.items():
            if data.get(name) is not None and data[name] not in neutral:
                raise ValueError(f"{name}: {reason}")
        return {name: value for name, value in data.items() if name not in _WITHOUT_EFFECT | _NOT_SUPPORTED.keys()}

    @model_validator(mode="after")
    def _one_constraint(self) -> Sampling:
        constraint = self.constraint()
        if constraint is not None and self.ignore_eos:
            raise ValueError(f"ignore_eos: what {constraint.field} asks for ends where it is complete; remove one")
        return self

    def constraint(self) -> Wanted | None:
        """What the output must match. Raises ValueError for more than one thing."""
        return wanted(
            self.response_format, self.structured_outputs, self.guided_json, self.guided_regex, self.guided_choice
        )

    @field_validator("logit_bias")
    @classmethod
    def _bias_in_range(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and not all(-100 <= bias <= 100 for bias in value.values()):
            raise ValueError("every bias must be in [-100, 100]")
        return value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or "" in stops or any(len(stop) > 1000 for stop in stops):
            raise ValueError("give at most 16 texts of 1 to 1000 characters")
        return value


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | list[TokenId] | list[Text] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None
    add_special_tokens: bool | None = Field(None, description="false: prompts that are texts get none")

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: only the value of n is supported; choose among n samples yourself")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probs of the prompt are not available; ask for echo or logprobs, not both")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """A message; empty fields of other kinds (``refusal``, ``tool_calls`` …) may be there, as clients echo them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, data: Any) -> Any:
        empty: tuple[Any, ...] = (None, [])
        return {k: v for k, v in data.items() if k == "content" or v not in empty} if isinstance(data, dict) else data

    def as_template(self) -> dict[str, str]:
        """What a chat template takes; it knows no developers, who are the newer name of system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {"name": self.name} if self.name else {}
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **named}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs=true")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model: str | None = Field(None, max_length=1000)
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = Field(None, max_length=1000)
    tokens: list[TokenId] = Field(max_length=1_000_000)


class SwapRequest(Strict):
    """POST /admin/draft."""

    draft: str | None = Field(max_length=4096, description="Directory, hub id, ngram, suffix; null: plain decoding")
    draft_length: str | int | None = Field(None, description="K or auto; null: as the server was started")
