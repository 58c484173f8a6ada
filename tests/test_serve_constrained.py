"""Constrained output over HTTP: every text matches, every mistake is named."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from spec.constraint import Grammar, Grammars
from spec.serve.constrained import Wanted
from spec.serve.texts import Texts
from tests.conftest import make_model
from tests.serve_process import ServerProcess

CHAT: Any = [{"role": "user", "content": "Tom has 3 apples."}]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # random models would never stop with it
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("constrained")
    target = make_model(folder / "target", tokenizer, rows=len(tokenizer) + 8)  # padded
    draft = make_model(folder / "draft", tokenizer, layers=2, seed=1)
    server = ServerProcess("--target", target, "--draft", draft, "--backend", "torch", "--dtype", "float32")
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60)


def checked(text: str) -> str:
    jsonschema.validate(json.loads(text), SCHEMA)
    return text


def test_a_schema_holds_for_every_sample_streamed_or_not(client) -> None:
    """Two samples at temperature 1, drafts accepted and rejected; and the same as plain decoding would say greedily."""
    body: dict[str, Any] = {"model": "target", "messages": CHAT, "response_format": FORMAT, "max_tokens": 200}
    sampled = {"n": 2, "temperature": 1, "seed": 3, "extra_body": {"metrics": True, "draft_length": 3}}
    given = client.chat.completions.create(**body, **sampled)
    texts = [checked(choice.message.content) for choice in given.choices]
    assert texts[0] != texts[1] and {choice.finish_reason for choice in given.choices} == {"stop"}
    assert all(0 < facts["accepted"] < facts["drafted"] for facts in given.metrics["choices"])
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**body, **sampled, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    quick, plain = (
        client.chat.completions.create(**body, temperature=0, extra_body={"draft_length": length}) for length in (3, 0)
    )
    assert checked(quick.choices[0].message.content) == plain.choices[0].message.content


@pytest.mark.parametrize(
    ("asked", "pattern"),
    (
        ({"guided_regex": "[A-C]{2,5}-[0-9]+x"}, "[A-C]{2,5}-[0-9]+x"),
        ({"structured_outputs": {"regex": "(yes|no)+!"}}, "(yes|no)+!"),
        ({"guided_choice": ["red", "green", "ré\n😀"]}, "red|green|ré\n😀"),
        ({"structured_outputs": {"choice": ["left or right"]}}, "left or right"),
        ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 12}}, "1[0-2]"),
        ({"guided_json": '{"enum": [null]}'}, "null"),
        ({"structured_outputs": {"json": {"const": "a"}}}, '"a"'),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 10}, r"(?s)\{.*"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 10}, r"(?s)\{.*"),
        ({"response_format": {"type": "text"}}, "(?s).*"),
    ),
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_every_form_of_constraint(asked: dict[str, Any], pattern: str, server) -> None:
    for stream in (False, True):
        body = {"prompt": ["A farmer", "Ann"], "n": 2, "max_tokens": 60, "seed": 1, **asked, "stream": stream}
        given = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
        lines = [line[6:] for line in given.text.splitlines() if line.startswith("data: {")] if stream else [given.text]
        texts = [""] * 4
        for choice in (choice for line in lines for choice in json.loads(line)["choices"]):
            texts[choice["index"]] += choice["text"]
        assert all(re.fullmatch(pattern, text) for text in texts), texts


def deep(levels: int) -> Any:
    schema: Any = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    (
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
         "response_format", "Invalid type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": deep(150)}}},
         "response_format", "recursion limit"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format", "a schema goes with"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"guided_json": "{"}, "guided_json", "delimiter|property name"),
        ({"guided_json": {"not": {"type": "string"}}}, "guided_json", "Unimplemented"),
        ({"guided_choice": []}, "guided_choice", "nothing to choose from"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-around"),
        ({"structured_outputs": {"grammar": "x"}}, "structured_outputs", "grammar is not supported"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, None, "one constraint"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_mistakes_name_the_field(asked: dict[str, Any], field: str | None, message: str, server) -> None:
    given = httpx.post(server.url + "/v1/chat/completions", json={"messages": CHAT, "max_tokens": 5, **asked})
    error = given.json()["error"]
    assert given.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == field and re.search(message, error["message"]), error


def test_grammars_are_compiled_beside_the_event_loop(tokenizer) -> None:
    names: list[str] = []

    def compile(grammars: Grammars) -> Grammar:
        names.append(threading.current_thread().name)
        return grammars.regex("a|b")

    texts = Texts(tokenizer, 100, Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]))
    first, second = (asyncio.run(texts.grammar(Wanted("guided_regex", compile))) for _ in range(2))
    assert first is second is not None and asyncio.run(texts.grammar(None)) is None
    assert all(name.startswith("tokenizer") for name in names)
