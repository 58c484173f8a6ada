"""Constrained output as clients ask for it: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and others."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from spec.constraint import Grammar, Grammars

Schema = dict[str, Any] | bool

_ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Wanted:
    """A grammar that is yet to be compiled, and the field that asks for it."""

    field: str
    compile: Callable[[Grammars], Grammar]  # raises ValueError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JsonSchema(_Part):
    """``strict`` and not make no difference: the schema is kept to, or refused."""

    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Part):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _together(self) -> ResponseFormat:
        schema = None if self.json_schema is None else self.json_schema.schema_
        if (self.type == "json_schema") != (schema is not None):
            raise ValueError('a schema goes with {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}')
        return self


class StructuredOutputs(_Part):
    """One of them."""

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, data: Any) -> Any:
        unknown = data.keys() - {"json", "json_object", "regex", "choice"} if isinstance(data, dict) else ()
        if unknown:
            raise ValueError(f"{min(unknown)} is not supported; use json, json_object, regex or choice")
        return data


def wanted(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputs | None,
    guided_json: Schema | str | None,
    guided_regex: str | None,
    guided_choice: list[str] | None,
) -> Wanted | None:
    """What they ask for together. Raises ValueError where that is more than one thing."""
    found = [*_of_format(response_format), *_of_parts("guided_{}", guided_json, guided_regex, guided_choice)]
    if structured_outputs is not None:
        parts = structured_outputs
        schema = _ANY_OBJECT if parts.json_object and parts.json_ is None else parts.json_
        found += _of_parts("structured_outputs.{}", schema, parts.regex, parts.choice)
    if len(found) > 1:
        raise ValueError(f"{found[0].field} and {found[1].field}: an output has one constraint; give one of them")
    return found[0] if found else None


def _of_format(format: ResponseFormat | None) -> Iterator[Wanted]:
    if format is not None and format.type != "text":
        schema = None if format.json_schema is None else format.json_schema.schema_
        yield Wanted(
            "response_format", lambda grammars: grammars.json_schema(_ANY_OBJECT if schema is None else schema)
        )


def _of_parts(field: str, schema: Schema | str | None, regex: str | None, choice: list[str] | None) -> Iterator[Wanted]:
    if schema is not None:
        parse: Callable[[], Any] = lambda: json.loads(schema) if isinstance(schema, str) else schema  # noqa: E731
        yield Wanted(field.format("json"), lambda grammars: grammars.json_schema(parse()))
    if regex is not None:
        yield Wanted(field.format("regex"), lambda grammars: grammars.regex(regex))
    if choice is not None:
        yield Wanted(field.format("choice"), lambda grammars: grammars.choice(choice))
