"""Streams as clients read them: curl, the ``openai`` client as LangChain drives it, and the page with its figures."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import make_model
from tests.serve_process import ServerProcess

QUESTION: Any = [{"role": "user", "content": "How many apples?"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    """The target is its own draft, so that drafts are accepted."""
    target = make_model(tmp_path_factory.mktemp("clients") / "target", tokenizer)
    server = ServerProcess(
        "--target", target, "--draft", target, "--dtype", "float32", "--backend", "torch", "--draft-length", 3,
        "--audit-at-start", 0, "--audit-share", 0,
    )  # fmt: skip
    yield server
    assert server.stop() == 0


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_tokens_while_the_answer_is_written(server) -> None:
    body = {"messages": QUESTION, "stream": True, "max_tokens": 400, "ignore_eos": True, "n": 8}
    curl = subprocess.Popen(
        ["curl", "-sN", server.url + "/v1/chat/completions", "-H", "Content-Type: application/json", "-d",
         json.dumps(body)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert curl.stdout is not None
    first = curl.stdout.readline()
    assert first.startswith("data: {") and server.figure("vllm:num_requests_running") == 8
    lines = [line for line in curl.stdout if line.strip()]
    assert curl.wait(10) == 0 and lines[-1] == "data: [DONE]\n"
    ends = [c["finish_reason"] for line in lines[:-1] for c in json.loads(line[6:])["choices"]]
    assert ends.count("length") == 8


def langchain_chunks(client: openai.OpenAI, **body: Any) -> dict[str, Any]:
    """What ``langchain_openai.ChatOpenAI.stream`` asks for, and how it puts the chunks together."""
    found: dict[str, Any] = {"content": "", "role": None, "usage": None, "ids": set()}
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **body):
        chunk = chunk.model_dump()
        if chunk["usage"]:  # a chunk of its own, with no choices
            assert found["usage"] is None
            found["usage"] = chunk["usage"]
        if not chunk["choices"]:
            continue
        choice = chunk["choices"][0]
        if choice["delta"] is None:
            continue
        found["ids"].add(chunk["id"])
        found["role"] = choice["delta"].get("role") or found["role"]
        found["content"] += choice["delta"].get("content") or ""
        if reason := choice.get("finish_reason"):
            found |= {"finish_reason": reason, "model_name": chunk["model"], "fingerprint": chunk["system_fingerprint"]}
        assert choice["logprobs"] is None or choice["logprobs"]["content"]
    return found


def test_a_stream_as_langchain_reads_it(server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    body = {"model": "target", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 20, "n": 1}
    found = langchain_chunks(client, **body, extra_body={"ignore_eos": True})
    whole = client.chat.completions.create(**body, extra_body={"ignore_eos": True})
    assert found["content"] == whole.choices[0].message.content and found["role"] == "assistant"
    assert (found["finish_reason"], found["model_name"]) == ("length", "target") and found["fingerprint"]
    assert found["usage"]["completion_tokens"] == 20 == found["usage"]["total_tokens"] - found["usage"]["prompt_tokens"]
    assert len(found["ids"]) == 1


def test_langchain_itself(server) -> None:
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(
        base_url=server.url + "/v1", api_key="none", model="target", temperature=0, max_tokens=20, stream_usage=True
    )
    whole = chat.invoke("How many apples?")
    parts = list(chat.stream("How many apples?"))
    assert len(parts) > 3 and "".join(str(part.content) for part in parts) == whole.content
    usage = [part.usage_metadata for part in parts if part.usage_metadata]
    assert [u["output_tokens"] for u in usage] == [whole.usage_metadata["output_tokens"]]


@pytest.mark.parametrize("stop", (None, "e"))
def test_running_figures_grow_to_the_final_ones(stop: str | None, server) -> None:
    """Of each choice, where a stop cuts a block of drafts too."""
    lengths = {"n": 2, "max_tokens": 50, "stop": stop, "ignore_eos": True}  # no seed: an end token could come at once
    body = {"messages": QUESTION, "stream": True, "metrics": True, **lengths}
    given = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    chunks = [json.loads(line[6:]) for line in given.text.splitlines() if line.startswith("data: {")]
    for index, whole in enumerate(chunks[-1]["metrics"]["choices"]):
        live = [c["so_far"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert live[-1] == {name: whole[name] for name in ("tokens", "accepted", "drafted", "target_steps")}
        assert all(a[name] <= b[name] for a, b in itertools.pairwise(live) for name in a)
        assert stop or live[-1]["accepted"] > 20
