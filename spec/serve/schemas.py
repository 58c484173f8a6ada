"""What goes back, for the API's own description at ``/openapi.json``: the handlers write these objects by hand."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str = Field(description="What is wrong, and the remedy")
    type: str
    param: str | None = Field(description="Path of the field that is meant")
    code: str | None


class Error(BaseModel):
    """Every answer that is an error; in a stream, the last event before [DONE]."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Facts(BaseModel):
    """What speculation did, with ``metrics: true``."""

    choices: list[dict[str, Any]]
    tokens_per_target_step: float | None
    seconds_to_first_token: float | None
    seconds: float


class CompletionLogprobs(BaseModel):
    """Of the tokens of a choice."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class _Choice(BaseModel):
    index: int
    finish_reason: FinishReason
    token_ids: list[int] = Field([], description="With return_token_ids")


class CompletionChoice(_Choice):
    """One text."""

    text: str
    logprobs: CompletionLogprobs | None


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage
    metrics: Facts | None = Field(None, description="With metrics=true")


class Completion(_Answer):
    """Of /v1/completions; as a stream, its chunks."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class TokenAlternative(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TokenAlternative):
    """The one that was drawn."""

    top_logprobs: list[TokenAlternative]


class ChatLogprobs(BaseModel):
    """Of the tokens of a choice."""

    content: list[TokenLogprob]
    refusal: None


class ChatChoice(_Choice):
    """One message."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(_Answer):
    """Of /v1/chat/completions; as a stream, its chunks."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Draft(BaseModel):
    """A draft in use."""

    draft: str | None
    draft_length: str


class Model(BaseModel):
    """The one that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    draft: Draft


class Models(BaseModel):
    """Of /v1/models."""

    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    """Of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(BaseModel):
    """Of /detokenize."""

    prompt: str


class DraftState(BaseModel):
    """Of /admin/draft."""

    version: int
    current: Draft
    previous: Draft | None


class Status(BaseModel):
    """Of the health paths."""

    status: str


_ERRORS = {
    400: "Not valid, or more than this server does", 401: "No key, or a wrong one", 403: "Administration is off",
    404: "No such model or path", 408: "Not done in time", 409: "The draft is not fit, or a swap is under way",
    413: "The body is too large", 429: "The queue is full; see Retry-After", 500: "The engine failed",
    503: "The engine takes no requests",
}  # fmt: skip


def answers(model: type[BaseModel], *errors: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """For ``responses=`` of a path: what it answers if all is well, and the errors it may answer."""
    well: dict[str, Any] = {"model": model}
    if stream:
        event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
        well["content"] = {"text/event-stream": {"schema": event}}  # data: a chunk as JSON, an error, or [DONE]
    declared: dict[int | str, dict[str, Any]] = {
        status: {"model": Error, "description": _ERRORS[status]} for status in errors
    }
    return {200: well, **declared, "default": {"model": Error, "description": "An error"}}
