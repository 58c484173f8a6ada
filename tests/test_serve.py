"""A real server process on tiny models, spoken to by the ``openai`` client and by plain HTTP."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from spec import loading
from spec.engine import Engine
from spec.params import Params
from spec.request import Completion, Request
from tests.conftest import make_model
from tests.serve_process import ROOT, ServerProcess

PROMPT = "Tom has 3 apples and buys 4 more."
CHAT: Any = [{"role": "user", "content": PROMPT}]
COMMON = ("--backend", "torch", "--dtype", "float32")


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("serve")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{token}>": id for token, id in tokenizer.get_vocab().items()}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary)), eos_token="<<|im_end|>>")
    damaged, without = make_model(folder / "damaged", tokenizer, layers=1), folder / "no tokenizer"
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    shutil.copytree(damaged, without)
    (without / "tokenizer.json").write_text("{}")
    return {
        "damaged": damaged,
        "no tokenizer": without,
        "target": make_model(folder / "target", tokenizer),
        "draft": make_model(folder / "draft", tokenizer, layers=2, seed=1),
        "other": make_model(folder / "other", other, layers=1),
    }


@pytest.fixture(scope="module")
def engine(models, tokenizer) -> Engine:
    """The target alone, as the server loads it."""
    target = loading.open_target(str(models["target"]), loading.ModelOptions("float32"))
    return Engine(target, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def server(models):
    server = ServerProcess("--target", models["target"], "--draft", models["draft"], *COMMON, "--audit-share", 1)
    yield server
    assert server.figure("spec_audit_different") == 0  # whatever the tests of this file asked for
    assert server.stop() == 0


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0, timeout=60)


def alone(
    engine: Engine, prompt_ids: list[int], max_tokens: int, params: Params | None = None, **options
) -> Completion:
    """What the target says by itself, greedily unless ``params`` say otherwise."""
    request = Request(prompt_ids, params or Params(temperature=0), max_tokens, **options)
    return engine.generate([request])[0].completions[0]


def _other_target(engine: Engine):
    """A model that the server does not run: its draft."""
    name = str(Path(engine.target.name).parent / "draft")
    return loading.open_target(name, loading.ModelOptions("float32"))


# ------------------------------------------------------------------------------------------------------ the answers


def test_greedy_answers_are_the_targets(client, engine, tokenizer) -> None:
    expected = alone(engine, tokenizer(PROMPT)["input_ids"], 24)
    given = client.completions.create(model="target", prompt=PROMPT, max_tokens=24, temperature=0)
    assert given.choices[0].text == expected.text and given.choices[0].finish_reason == expected.finish_reason
    prompt_tokens = len(tokenizer(PROMPT)["input_ids"])
    assert (given.usage.prompt_tokens, given.usage.completion_tokens) == (prompt_tokens, len(expected.token_ids))
    ids = loading.encode_prompt(tokenizer, PROMPT)
    chat = client.chat.completions.create(model="target", messages=CHAT, max_tokens=24, temperature=0)
    assert chat.choices[0].message.content == alone(engine, ids, 24).text
    assert chat.usage.prompt_tokens == len(ids)


SETTINGS: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.6, "top_k": 3, "min_p": 0.2, "presence_penalty": 1.5, "frequency_penalty": 1.5,
    "repetition_penalty": 1.8, "logit_bias": {"5": 6, "7": -100}, "allowed_token_ids": list(range(200)),
    "stop_token_ids": list(range(50, 90)), "stop": ["e", "a"], "max_tokens": 11, "seed": 12, "ignore_eos": True,
}  # fmt: skip


def expected_under(engine: Engine, ids: list[int], settings: dict[str, Any]) -> Completion:
    """What the engine gives for settings as a client writes them, with seed 15 and 40 tokens unless they say other."""
    given = {"seed": 15, "max_tokens": 40, "logit_bias": {2: 1.0}, **settings}  # the end of text is near
    stops = given.pop("stop_token_ids", ())
    end = () if given.pop("ignore_eos", False) else (2,)
    given["logit_bias"] = {int(id): bias for id, bias in given["logit_bias"].items()}
    if "allowed_token_ids" in given:
        given["allowed_token_ids"] = tuple(given["allowed_token_ids"])
    count, stop = given.pop("max_tokens"), tuple(given.pop("stop", ()))
    return alone(engine, ids, count, Params(**given), stop=stop, stop_token_ids=(*stops, *end))


def test_every_setting_reaches_the_engine(server, engine, tokenizer) -> None:
    """Each alone changes the seeded plain text, to the one that the engine gives for it; and so do all at once."""
    ids = tokenizer(PROMPT)["input_ids"]
    neutral = expected_under(engine, ids, {})
    assert neutral.finish_reason == "stop" and len(neutral.token_ids) > 11  # so that each can show
    cases: dict[str, dict[str, Any]] = {name: {name: value} for name, value in SETTINGS.items()}
    for name, settings in {**cases, "all": SETTINGS}.items():
        expected = expected_under(engine, ids, settings)
        body = {"prompt": PROMPT, "seed": 15, "max_tokens": 40, "logit_bias": {"2": 1}, "draft_length": 0, **settings}
        choice = httpx.post(server.url + "/v1/completions", json=body).json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected.text, expected.finish_reason), name
        assert expected.token_ids != neutral.token_ids, name


@pytest.mark.parametrize("chat", (False, True), ids=("completions", "chat"))
def test_streams_add_up_to_the_whole_answer(chat: bool, client) -> None:
    """Two samples in one stream, log-probs included; the last chunk has the usage and the facts."""
    ask = client.chat.completions.create if chat else client.completions.create
    body: dict[str, Any] = {
        "model": "target", "n": 2, "seed": 5, "max_tokens": 30, "extra_body": {"metrics": True},
        **({"messages": CHAT, "logprobs": True, "top_logprobs": 1} if chat else {"prompt": PROMPT, "logprobs": 1}),
    }  # fmt: skip
    whole = ask(**body)
    texts, reasons, logprobs, last = ["", ""], [None, None], [0, 0], None
    for chunk in ask(stream=True, stream_options={"include_usage": True}, **body):
        for choice in chunk.choices:
            assert reasons[choice.index] is None
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            reasons[choice.index] = choice.finish_reason
            logprobs[choice.index] += len(choice.logprobs.content if chat else choice.logprobs.tokens)
        last = chunk
    assert texts == [choice.message.content if chat else choice.text for choice in whole.choices]
    assert texts[0] != texts[1] and reasons == [choice.finish_reason for choice in whole.choices]
    assert last is not None and last.usage == whole.usage and not last.choices
    assert logprobs == [choice["tokens"] for choice in last.metrics["choices"]]


def test_a_stream_has_one_chunk_a_step(client) -> None:
    """However many tokens the step gave: of drafts there are several."""
    body: dict[str, Any] = {"model": "target", "prompt": PROMPT, "max_tokens": 30, "seed": 5, "temperature": 0.3}
    extra = {"return_token_ids": True, "ignore_eos": True}
    facts = client.completions.create(**body, extra_body={**extra, "metrics": True}).metrics["choices"][0]
    chunks = [c.choices[0].token_ids for c in client.completions.create(stream=True, **body, extra_body=extra)]
    assert len(chunks) == facts["target_steps"] < sum(map(len, chunks)) == facts["tokens"] == 30


def test_offsets_of_a_stream_are_those_of_the_whole(client) -> None:
    body: dict[str, Any] = {"model": "target", "prompt": PROMPT, "max_tokens": 8, "seed": 2, "logprobs": 0}
    whole = client.completions.create(**body).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(stream=True, **body)]
    assert [at for part in parts for at in part.logprobs.text_offset] == whole.logprobs.text_offset


def test_seeds(client) -> None:
    """The same seed, the same text, though drafts come and go; no seed, a new text every time."""

    def text(**options: Any) -> str:
        given = client.completions.create(model="target", prompt=PROMPT, max_tokens=30, **options)
        return given.choices[0].text

    assert text(seed=3) == text(seed=3) != text(seed=4)
    assert len({text() for _ in range(3)}) == 3


def test_stop_strings_end_the_text_before_them(client) -> None:
    whole = client.completions.create(model="target", prompt=PROMPT, max_tokens=40, temperature=0).choices[0].text
    stop = whole[10:13]
    for stream in (False, True):
        given = client.completions.create(
            model="target", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "never"], stream=stream
        )
        choices = [chunk.choices[0] for chunk in given] if stream else given.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logprobs_are_the_models(client, engine, tokenizer) -> None:
    """Of each token given all before it, by transformers; raw, so temperature does not move them."""
    from transformers import AutoModelForCausalLM

    given = client.chat.completions.create(
        model="target", messages=CHAT, max_tokens=12, temperature=0.5, logprobs=True, top_logprobs=3, seed=1,
        extra_body={"draft_length": 0},
    )  # fmt: skip
    prompt = loading.encode_prompt(tokenizer, PROMPT)
    content = given.choices[0].logprobs.content
    model = AutoModelForCausalLM.from_pretrained(engine.target.name, dtype=torch.float32)
    ids = alone(engine, prompt, 12, Params(temperature=0.5, seed=1)).token_ids
    with torch.inference_mode():
        law = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for row, id, entry in zip(law, ids, content, strict=True):
        assert entry.logprob == pytest.approx(float(row[id]), abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        assert entry.token == tokenizer.decode([id]) == bytes(entry.bytes).decode()


def test_prompts_of_every_kind_and_echo(client, tokenizer) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    common: dict[str, Any] = {"model": "target", "max_tokens": 6, "temperature": 0}
    text = client.completions.create(prompt=PROMPT, **common).choices[0].text
    other = client.completions.create(prompt="A farmer", **common).choices[0].text
    for prompt, texts in ((ids, [text]), ([PROMPT, "A farmer"], [text, other]), ([ids, ids], [text, text])):
        assert [choice.text for choice in client.completions.create(prompt=prompt, **common).choices] == texts
    many = client.completions.create(prompt=[PROMPT, "A farmer"], n=2, echo=True, **common).choices
    assert [choice.text for choice in many] == [PROMPT + text] * 2 + ["A farmer" + other] * 2
    assert [choice.index for choice in many] == [0, 1, 2, 3]
    assert client.completions.create(prompt=ids, echo=True, **common).choices[0].text == tokenizer.decode(ids) + text
    parts = [{"role": "developer", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    plain = [{"role": "system", "content": "x"}, *CHAT]
    answers = {
        client.chat.completions.create(messages=messages, **common).choices[0].message.content
        for messages in (parts, plain)
    }
    assert len(answers) == 1


@pytest.mark.parametrize("chat", (False, True), ids=("completions", "chat"))
def test_token_ids_are_told_on_request(chat: bool, client, engine, tokenizer) -> None:
    """Whole and streamed: all of them, what stopped the text and what shows nothing included."""
    ids = loading.encode_prompt(tokenizer, PROMPT) if chat else tokenizer(PROMPT)["input_ids"]
    stop = alone(engine, ids, 20).token_ids[12]
    expected = alone(engine, ids, 20, stop_token_ids=(stop,)).token_ids
    ask = client.chat.completions.create if chat else client.completions.create
    body: dict[str, Any] = {
        "model": "target", "max_tokens": 20, "temperature": 0, "n": 2, "logprobs": True if chat else 0,
        "extra_body": {"return_token_ids": True, "return_tokens_as_token_ids": True, "stop_token_ids": [stop]},
        **({"messages": CHAT} if chat else {"prompt": PROMPT}),
    }  # fmt: skip
    for choice in ask(**body).choices:
        assert choice.token_ids == expected and expected[-1] == stop and choice.finish_reason == "stop"
        names = [c.token for c in choice.logprobs.content] if chat else choice.logprobs.tokens
        assert names == [f"token_id:{id}" for id in expected]
    streamed: list[list[int]] = [[], []]
    for chunk in ask(stream=True, **body):
        streamed[chunk.choices[0].index] += chunk.choices[0].token_ids
    assert streamed == [expected, expected]
    body["extra_body"] = {}
    assert not hasattr(ask(**body).choices[0], "token_ids")


@pytest.mark.parametrize("stream", (False, True))
def test_special_tokens_show_on_request(stream: bool, client) -> None:
    """One in the middle, by a bias: <|im_start|> is token 1."""

    def text(**extra: Any) -> str:
        given = client.completions.create(
            model="target", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={"1": 100}, stream=stream,
            extra_body={"ignore_eos": True, **extra},
        )  # fmt: skip
        return "".join(part.choices[0].text for part in (given if stream else [given]))

    assert text(skip_special_tokens=False) == "<|im_start|>" * 4 and text(skip_special_tokens=True) == text() == ""


def test_the_servers_own_audit_reads_its_tokens(server, engine, tokenizer) -> None:
    """The black-box audit of a real server: whatever panel, every token as it was drawn."""
    from spec.audit.conditionals import ModelConditionals
    from spec.audit.engines.server import ServerEngine
    from spec.audit.scoring import Scorer
    from spec.audit.statistical import Settings, audit

    settings = Settings(tokens=800, delta=1e-6, epsilon=0.5, max_tokens=16, stop_early=False)
    prompts = [tokenizer(text)["input_ids"] for text in (PROMPT, "A farmer has 12 cows")]
    verdict = audit(ServerEngine(server.url, tokenizer), Scorer(ModelConditionals(engine.target)), prompts, settings)
    assert verdict.verdict in ("equivalent", "undecided") and verdict.tokens >= 800
    wrong = Scorer(ModelConditionals(_other_target(engine)))
    assert audit(ServerEngine(server.url, tokenizer), wrong, prompts, settings).verdict == "different"


def test_facts_of_a_request_and_the_metrics_agree(client, server) -> None:
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total",
             "spec:target_steps_total", "vllm:generation_tokens_total", "vllm:prompt_tokens_total",
             "vllm:spec_decode_num_accepted_tokens_per_pos_total", "spec:drafted_tokens_per_pos_total",
             "vllm:time_to_first_token_seconds_count", "vllm:request_queue_time_seconds_count")  # fmt: skip
    before = {name: server.figure(name) for name in names}
    given = client.completions.create(
        model="target", prompt=PROMPT, max_tokens=30, n=2, temperature=0.7,
        extra_body={"metrics": True, "draft_length": 3, "ignore_eos": True},
    )  # fmt: skip
    facts = given.metrics["choices"]
    for fact in facts:
        assert fact["tokens"] == 30 and 30 - fact["accepted"] <= fact["target_steps"] <= 31 - fact["accepted"]
        assert fact["drafted"] == sum(fact["drafted_by_position"]) > 0 and len(fact["drafted_by_position"]) == 3
        assert fact["accepted"] == sum(fact["accepted_by_position"])
    drafted, accepted = (sum(fact[name] for fact in facts) for name in ("drafted", "accepted"))
    steps = sum(fact["target_steps"] for fact in facts)
    expected = (drafted, accepted, steps, 60, given.usage.prompt_tokens, accepted, drafted, 1, 1)
    assert [server.figure(name) - before[name] for name in names] == list(expected)
    plain = client.completions.create(
        model="target", prompt=PROMPT, max_tokens=30, extra_body={"metrics": True, "draft_length": 0}
    )
    assert plain.metrics["choices"][0]["drafted"] == 0


def test_answers_are_audited_while_they_are_served(client, server) -> None:
    names = ("spec_audit_tokens_total", "spec_audit_samples_total", "spec_audit_skipped_total")
    tokens, samples, skipped = (server.at_rest(name) for name in names)  # of what earlier tests asked
    for i in range(8):
        client.completions.create(
            model="target", prompt=[PROMPT, f"Bill {i}"], max_tokens=70, extra_body={"ignore_eos": True},
            temperature=0 if i == 7 else 0.8,
        )  # fmt: skip
    server.settled("spec_audit_tokens_total", tokens + 14 * 64)
    assert (server.figure(names[1]), server.figure(names[2])) == (samples + 14, skipped + 2)
    assert server.figure("spec_audit_log10_e") < 6 and 0 < server.figure("spec_audit_epsilon") < 1


def test_tokens_there_and_back(server, tokenizer) -> None:
    ids = tokenizer(PROMPT)["input_ids"]
    given = httpx.post(server.url + "/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).json()
    assert given["tokens"] == ids and given["count"] == len(ids) and "".join(given["token_strs"]) == PROMPT
    chat = httpx.post(server.url + "/tokenize", json={"messages": CHAT}).json()
    assert chat["tokens"] == loading.encode_prompt(tokenizer, PROMPT)
    assert httpx.post(server.url + "/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}


def test_models_health_and_page(client, server) -> None:
    assert [card.id for card in client.models.list()] == ["target"] and client.models.retrieve("target").max_model_len
    for path in ("/health", "/health/live", "/health/ready"):
        assert httpx.get(server.url + path).json() == {"status": "ok"}
    page = httpx.get(server.url + "/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for source in re.findall(r'(?:src|href)="([^"]+)"', page.text):
        assert httpx.get(server.url + source).status_code == 200, source
    assert "http" not in re.sub(r'http-equiv|xmlns="[^"]*"', "", page.text)  # nothing comes from elsewhere


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("body", "status", "message"),
    (
        ({"model": "gpt-4"}, 404, "this server has 'target'"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n: "),
        ({"n": 129}, 400, "n: "),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10_000}, 400, "pass the context of 512"),
        ({"prompt": "word " * 600}, 400, "pass the context of 512"),
        ({"prompt": "word " * 100_000}, 400, "more than 512 tokens can hold"),
        ({"prompt": []}, 400, "is empty"),
        ({"prompt": ""}, 400, "the prompt is empty"),
        ({"prompt": [1, 99999]}, 400, "outside the vocabulary"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"logit_bias": {"99999": 1}}, 400, "outside the vocabulary"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 101}}, 400, "[-100, 100]"),
        ({"logit_bias": {"5": 1, "05": 2}}, 400, "logit_bias"),
        ({"repetition_penalty": 1e-38}, 400, "repetition_penalty"),
        ({"prompt": [""] * 20_000}, 400, "20000 choices: at most 128"),
        ({"prompt": ["a", "b"], "n": 65}, 400, "130 choices: at most 128"),
        ({"allowed_token_ids": [1] * 65_537}, 400, "allowed_token_ids"),
        ({"draft_length": 17}, 400, "less than or equal to 16"),
        ({"min_tokens": 1}, 400, "min_tokens: not supported"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "at most 16"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"echo": True, "logprobs": 1}, 400, "echo or logprobs, not both"),
        ({"best_of": 3}, 400, "only the value of n"),
        ({"suffix": "x"}, 400, "insertion is not supported"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format: a schema goes with"),
        ({"guided_regex": "("}, 400, "guided_regex: unclosed group"),
        ({"guided_regex": "a", "ignore_eos": True}, 400, "ignore_eos: what guided_regex asks for ends"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_regex and guided_choice: an output has one"),
        ({"guided_grammar": "start: A"}, 400, "use a JSON schema"),
        ({"max_token": 5}, 400, "max_token: unknown field"),
        ({"seed": 2**70}, 400, "seed"),
        ({"draft_length": -1}, 400, "draft_length"),
        ({"allowed_token_ids": []}, 400, "allowed_token_ids"),
    ),
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_answered_in_openais_format(body, status: int, message: str, server) -> None:
    given = httpx.post(server.url + "/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, **body})
    error = given.json()["error"]
    assert given.status_code == status and message in error["message"] and set(error) == {
        "message", "type", "param", "code"
    }  # fmt: skip
    assert "word word" not in given.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    (
        ("completions", {"prompt": {"a": 1}}, "prompt"),
        ("completions", {"prompt": ["a", 1]}, "prompt[1]"),
        ("completions", {"prompt": [[1], [2, "x"]]}, "prompt[1][1]"),
        ("completions", {"prompt": "x", "stop": [1]}, "stop[0]"),
        ("completions", {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("completions", {"prompt": "x", "max_token": 2}, "max_token"),
        ("completions", {"prompt": "x", "stream_options": {"include_usage": "?"}}, "stream_options.include_usage"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
         "messages[0].content[0].text"),
        ("chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", "cards": 1}]}, "messages[0]"),
    ),
)  # fmt: skip
def test_an_error_names_the_fields_path(path: str, body: dict[str, Any], param: str, server) -> None:
    error = httpx.post(f"{server.url}/v1/{path}", json=body).json()["error"]
    assert error["param"] == param and error["message"].startswith(param + ": ")


@pytest.mark.parametrize("temperature", (0.01, 1.0))
def test_extreme_settings_within_the_ranges_give_an_answer(temperature: float, client) -> None:
    for extreme in (
        {"top_p": 7e-46}, {"repetition_penalty": 0.01}, {"min_p": 1e-300}, {"top_p": 1e-300, "min_p": 1.0},
        {"logit_bias": {str(i): 100 if i % 2 else -100 for i in range(300)}},
    ):  # fmt: skip
        given = client.completions.create(
            model="target", prompt=PROMPT, max_tokens=8, temperature=temperature, extra_body=extreme, n=2
        )
        assert len(given.choices) == 2
    given = client.completions.create(model="target", prompt=PROMPT, max_tokens=8, top_p=7e-46)
    assert (
        given.choices[0].text
        == client.completions.create(model="target", prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text
    )


def test_the_description_of_the_api_names_its_errors_and_answers(server) -> None:
    described = httpx.get(server.url + "/openapi.json").json()
    post = described["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= post.keys() and "422" not in post
    error = {"$ref": "#/components/schemas/Error"}
    assert all(post[status]["content"]["application/json"]["schema"] == error for status in post.keys() - {"200"})
    assert "HTTPValidationError" not in described["components"]["schemas"]
    assert "/admin/draft" in described["paths"]


def test_the_client_raises_its_own_exceptions(client) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has"):
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    with pytest.raises(openai.BadRequestError, match="tools are not supported") as caught:
        tool: Any = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="target", messages=CHAT, tools=[tool])
    assert caught.value.type == "invalid_request_error"
    for message in ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, {"role": "tool"}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="target", messages=[message])


@pytest.mark.parametrize(
    "body",
    (
        b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"prompt": ["\\udfff"]}',
        b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "max_tokens": 1e400}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": [[]]}', b'{"prompt": [true]}',
        b'{"messages": []}', b'{"messages": [null]}', b'{"messages": {"role": "user"}}', b'{"model": 7}',
        b'{"messages": [{"role": "user", "content": null}]}', b'{"stream_options": {"x": 1}}',
    ),
    ids=lambda body: repr(body[:24]),
)  # fmt: skip
def test_no_body_makes_the_server_fail(body: bytes, server) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        given = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= given.status_code < 500 and "error" in given.json(), (path, given.text)


def test_other_paths_and_methods(server) -> None:
    assert httpx.get(server.url + "/v1/nothing").status_code == 404
    assert httpx.get(server.url + "/v1/completions").status_code == 405
    assert httpx.post(server.url + "/admin/draft", json={"draft": None}).status_code == 403
    assert httpx.get(server.url + "/page/../start.py").status_code == 404
    for name, status in (("evil.example", 400), ("127.0.0.1.evil", 400), ("LocalHost:99", 200), ("[::1]:8000", 200)):
        foreign = httpx.get(server.url + "/v1/models", headers={"Host": name})
        assert foreign.status_code == status, name
    assert httpx.get(server.url + "/", headers={"Host": "evil"}).json()["error"]["type"] == "invalid_request_error"
    assert (
        "access-control-allow-origin"
        not in httpx.get(server.url + "/v1/models", headers={"Origin": "http://x"}).headers
    )


def test_the_log_has_facts_and_no_text(client, server) -> None:
    given = client.completions.with_raw_response.create(model="target", prompt="a secret text", max_tokens=5)
    line = server.event("request", id=given.headers["x-request-id"])
    assert line["status"] == 200 and line["completion_tokens"] <= 5 and line["prompt_tokens"] > 0
    assert {"drafted", "accepted", "target_steps", "seconds", "path"} <= line.keys()
    assert "secret" not in json.dumps(server.lines)


@pytest.mark.parametrize("name", ("damaged", "no tokenizer"))
def test_a_damaged_target_ends_the_start_with_one_line(name: str, models) -> None:
    command = [sys.executable, "-m", "spec.serve", "--target", str(models[name]), "--port", "0", *COMMON]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: cannot load the ")


# ------------------------------------------------------------------------------------------------------ operation


@pytest.fixture(scope="module")
def busy_server(models):
    """Room for two sequences and six behind them, with keys."""
    server = ServerProcess(
        "--target", models["target"], "--draft", models["draft"], *COMMON, "--max-running", 2, "--max-waiting", 6,
        "--max-body", 4096, "--draft-length", 2, "--cors-origin", "http://friend", "--admin-key", "root",
        env={"SPEC_API_KEY": "k"},
    )  # fmt: skip
    yield server
    if server.process.poll() is None:
        server.stop()


KEY = {"Authorization": "Bearer k"}
LONG = {"prompt": PROMPT, "max_tokens": 480, "ignore_eos": True}


def test_keys_sizes_and_origins(busy_server) -> None:
    url = busy_server.url
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer kä".encode()}):
        given = httpx.post(url + "/v1/completions", json={"prompt": "x"}, headers=headers)
        assert given.status_code == 401 and given.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(url + "/v1/models").status_code == httpx.post(url + "/tokenize", json={}).status_code == 401
    for path in ("/", "/health", "/metrics"):
        assert httpx.get(url + path).status_code == 200
    for key, status in (("k", 401), ("root", 200)):
        assert httpx.get(url + "/admin/draft", headers={"Authorization": f"Bearer {key}"}).status_code == status
    assert httpx.post(url + "/v1/completions", json={"prompt": "x" * 5000}, headers=KEY).status_code == 413
    chunked = httpx.post(url + "/v1/completions", content=iter([b"x" * 3000] * 2), headers=KEY)
    assert chunked.status_code == 413
    friend = httpx.get(url + "/v1/models", headers={**KEY, "Origin": "http://friend"})
    assert friend.headers["access-control-allow-origin"] == "http://friend"
    for origin, status in (("http://friend", 200), ("http://foe", 400)):
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        given = httpx.options(url + "/v1/models", headers=asks)
        assert given.status_code == status and (status == 200 or "CORS" in given.json()["error"]["message"])


def test_a_full_queue_answers_429_and_a_client_that_leaves_frees_its_slots(busy_server) -> None:
    url, server = busy_server.url, busy_server
    tokens = server.figure("vllm:generation_tokens_total")
    with httpx.stream("POST", url + "/v1/completions", json={**LONG, "n": 8, "stream": True}, headers=KEY) as stream:
        lines = stream.iter_lines()
        next(lines)
        full = httpx.post(url + "/v1/completions", json={"prompt": "x"}, headers=KEY)
        assert full.status_code == 429 and int(full.headers["Retry-After"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert 0 < server.figure("vllm:kv_cache_usage_perc") <= 1
        assert server.figure("vllm:inter_token_latency_seconds_count") > 0
    server.settled("vllm:num_requests_running", 0)
    server.settled("vllm:num_requests_waiting", 0)
    server.settled("vllm:kv_cache_usage_perc", 0)  # nothing is held for one who has gone
    assert server.figure("vllm:generation_tokens_total") - tokens < 8 * 480 / 2  # ended long before its end
    assert server.event("request", cancelled=True)
    assert httpx.post(url + "/v1/completions", json={"prompt": "x"}, headers=KEY).status_code == 200


def test_a_client_that_leaves_before_its_answer_frees_its_slots_too(busy_server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(busy_server.url + "/v1/completions", json={**LONG, "n": 8}, headers=KEY, timeout=0.3)
    assert busy_server.event("request", status=499)
    busy_server.settled("vllm:num_requests_running", 0)


def test_drafts_swap_while_requests_run(busy_server, models, engine, tokenizer) -> None:
    """Greedy streams that began before the swap end as the target alone would; bad drafts leave all as it was."""
    url, admin = busy_server.url, {"Authorization": "Bearer root"}
    expected = alone(engine, tokenizer(PROMPT)["input_ids"], 480, stop_token_ids=()).text
    texts: list[str] = []

    def ask() -> None:
        given = httpx.post(url + "/v1/completions", json={**LONG, "temperature": 0}, headers=KEY, timeout=60)
        texts.append(given.json()["choices"][0]["text"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    swaps = [{"draft": str(models["target"]), "draft_length": 3}, {"draft": "ngram"}, {"draft": None}]
    for body in swaps:
        given = httpx.post(url + "/admin/draft", json=body, headers=admin, timeout=60)
        assert given.status_code == 200 and given.json()["current"]["draft"] == body["draft"], given.text
    for body, message in (
        ({"draft": str(models["other"])}, "different tokenizers"),
        ({"draft": "nowhere"}, "there is no such directory"),
        ({"draft": str(models["damaged"])}, "damaged"),
        ({"draft": str(models["no tokenizer"])}, "cannot load the tokenizer"),
        ({"draft": "ngram", "draft_length": "many"}, "give a number"),
        ({"draft": "somebody/something"}, "name a hub id with --allowed-draft"),
        ({"draft": "ngram+somebody/something"}, "name a hub id with --allowed-draft"),
    ):
        refused = httpx.post(url + "/admin/draft", json=body, headers=admin, timeout=60)
        assert refused.status_code == 400 and message in refused.json()["error"]["message"]
    back = httpx.post(url + "/admin/draft/rollback", headers=admin).json()
    assert back["current"] == {"draft": "ngram", "draft_length": "2"} and back["version"] == 4
    for thread in threads:
        thread.join()
    assert texts == [expected] * 6
    assert busy_server.figure("spec:draft_swaps_total") == 4
    card = httpx.get(url + "/v1/models", headers=KEY).json()["data"][0]
    assert card["draft"]["draft"] == "ngram"


def test_sigterm_lets_running_streams_end(busy_server) -> None:
    """The last of the file: the server ends with status 0, its stream whole, and takes no more."""
    url = busy_server.url
    with httpx.stream("POST", url + "/v1/completions", json={**LONG, "n": 4, "stream": True}, headers=KEY) as stream:
        lines = stream.iter_lines()
        next(lines)
        busy_server.process.terminate()
        time.sleep(0.3)
        with pytest.raises(httpx.TransportError):
            httpx.get(url + "/health/ready")
        data = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert sorted(c["index"] for d in data for c in d["choices"] if c["finish_reason"] == "length") == [0, 1, 2, 3]
    assert busy_server.process.wait(30) == 0 and busy_server.event("stopped", reason="drained")
