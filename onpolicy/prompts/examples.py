"""From the rows of a data set, whatever its columns, to examples of one form."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onpolicy.prompts.answers import final_answer, normalise
from onpolicy.prompts.config import SourceConfig
from onpolicy.prompts.sources import Row
from onpolicy.prompts.templates import Message

_MESSAGES = ("messages", "conversations")
_PROMPTS = ("prompt", "question", "problem", "query")
_PLAIN_PROMPTS = ("turns", "text")  # only where none of the above is there
_COMPLETIONS = ("completion", "response")
_ANSWERS = ("answer",)
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


@dataclass(frozen=True)
class Example:
    """One prompt before it is templated and tokenised."""

    messages: tuple[Message, ...]  # ends where the assistant is to speak
    origin: str  # for error messages, e.g. "gsm8k.jsonl row 17"
    answer: str | None = None  # checkable, e.g. "42"
    completion: str | None = None  # reference text
    instance: str | None = None  # what else must not be on both sides of the held-out split

    @property
    def key(self) -> str:
        """Normalised text: equal keys are the same prompt."""
        return "\n".join(f"{message['role']}: {normalise(message['content'])}" for message in self.messages)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits of a hash of :attr:`key`."""
        return content_hash(self.key)


@dataclass(frozen=True)
class Columns:
    """Which column holds what."""

    prompt: str
    conversational: bool  # a closing assistant message of the prompt column is the completion
    answer: str | None
    completion: str | None


def content_hash(text: str) -> str:
    """Twelve hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def find_columns(source: SourceConfig, columns: Sequence[str]) -> Columns:
    """The columns that ``source`` names, or those with the usual names.

    Raises ValueError, listing ``columns``, if a named one is missing or the prompt column cannot be told.
    """
    for setting in ("messages_column", "prompt_column", "completion_column", "answer_column"):
        name = getattr(source, setting)
        if name is not None and name not in columns:
            raise ValueError(f"{source.source} has no column {name!r} (prompts.{setting}); it has {_listed(columns)}")
    messages = source.messages_column or (None if source.prompt_column else _first(_MESSAGES, columns))
    return Columns(
        prompt=messages or source.prompt_column or _find_prompt(source, columns),
        conversational=messages is not None,
        answer=source.answer_column or _first(_ANSWERS, columns),
        completion=source.completion_column or _first(_COMPLETIONS, columns),
    )


def _find_prompt(source: SourceConfig, columns: Sequence[str]) -> str:
    candidates = [name for name in _PROMPTS if name in columns] or [name for name in _PLAIN_PROMPTS if name in columns]
    if len(candidates) == 1:
        return candidates[0]
    problem = f"several could be the prompt ({_listed(candidates)})" if candidates else "none is named like a prompt"
    raise ValueError(
        f"{source.source}: cannot tell which column holds the prompts: it has {_listed(columns)}, and {problem}. "
        "Set prompts.prompt_column (or prompts.messages_column for conversations)"
    )


def to_example(row: Row, columns: Columns, origin: str) -> Example:
    """Read one row. Raises ValueError, naming ``origin``, if a column is empty or of the wrong form."""
    messages, completion = _read_prompt(row, columns, origin)
    answer = _read_text(row, columns.answer, origin)
    if columns.completion is not None:
        completion = _read_text(row, columns.completion, origin)
    elif completion is None:
        completion = answer
    if answer is None and completion is not None and "####" in completion:
        answer = completion
    return Example(messages, origin, None if answer is None else final_answer(answer), completion)


def _read_prompt(row: Row, columns: Columns, origin: str) -> tuple[tuple[Message, ...], str | None]:
    value = row.get(columns.prompt)
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]  # turns: the later ones need the answers to the earlier
    if isinstance(value, str) and value.strip() and not columns.conversational:
        return ({"role": "user", "content": value},), None
    if not (isinstance(value, list) and value):
        expected = "a list of messages" if columns.conversational else "text or messages"
        raise ValueError(f"{origin}: column {columns.prompt!r} must hold {expected}, found {_shown(value)}")
    messages = [_read_message(message, columns.prompt, origin) for message in value]
    completion = None
    if columns.conversational and messages[-1]["role"] == "assistant":
        completion = messages.pop()["content"]
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{origin}: column {columns.prompt!r} has no user message")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{origin}: the prompt ends with an assistant message; name the column in prompts.messages_column to "
            "take that message as the completion"
        )
    return tuple(messages), completion


def _read_message(value: Any, column: str, origin: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{origin}: column {column!r} must hold messages with role and content, found {_shown(value)}")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{origin}: a message needs a role and a text content, found {_shown(value)}")
    return {"role": _ROLES.get(role, role), "content": content}


def _read_text(row: Row, column: str | None, origin: str) -> str | None:
    """A column's text; a list of messages counts as its last message. None where the row has none."""
    value = None if column is None else row.get(column)
    if isinstance(value, list) and value and column is not None:
        value = _read_message(value[-1], column, origin)["content"]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise ValueError(f"{origin}: column {column!r} must hold text or a number, found {_shown(value)}")


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(columns) or "no columns"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
