"""The adapter of OpenAI-compatible endpoints, against servers that differ as the real ones do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from spec_models import TableModel

from spec.audit.conditionals import ModelConditionals
from spec.audit.engines.ours import OurEngine
from spec.audit.engines.server import ServerEngine
from spec.audit.scoring import Scorer
from spec.audit.statistical import Settings, audit
from spec.engine import Engine
from spec.params import Params
from spec.request import Request

V, END = 8, 7
OPENAI = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "logit_bias", "presence_penalty",
          "frequency_penalty", "logprobs"}  # fmt: skip
VLLM = OPENAI | {"top_k", "min_p", "repetition_penalty", "ignore_eos", "return_token_ids"}
OLD_VLLM = VLLM - {"return_token_ids"} | {"return_tokens_as_token_ids", "skip_special_tokens"}


def target(seed: int = 0) -> TableModel:
    table = 1.5 * np.random.default_rng(seed).standard_normal((V, V, V))
    return TableModel(lambda text: table[text[-2] if len(text) > 1 else 0, text[-1]], V)


class Server(BaseHTTPRequestHandler):
    """An endpoint over our own engine that stops at END; class attributes say which server it takes after."""

    knows: set[str] = VLLM
    style = "token_ids"
    default_top_k = 2  # what vLLM takes from a checkpoint's generation_config if nothing is sent
    miscounts: int | None = None  # answers with this token are counted wrong
    owner = "tests"
    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": "tiny", "owned_by": self.owner}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        unknown = sorted(body.keys() - self.knows)
        if unknown:  # as pydantic has it: the first alone
            return self._say(400, {"error": {"message": f"{unknown[0]}: Extra inputs are not permitted"}})
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        shaping = {name: body[name] for name in names if name in body}
        params = Params(top_k=body.get("top_k", self.default_top_k), seed=body.get("seed", len(self.bodies)), **shaping)
        request = Request(body["prompt"], params, body["max_tokens"])
        sample = OurEngine(Engine(target(), None)).generate([request])[0]
        tokens, reason = list(sample.token_ids), "length"
        if not body.get("ignore_eos") and END in tokens:
            tokens, reason = tokens[: tokens.index(END) + 1], "stop"
        told = len(tokens) + (self.miscounts in tokens)
        choice: dict[str, Any] = {
            "text": " ".join(str(t) for t in tokens if t != END or body.get("ignore_eos")), "finish_reason": reason,
            "logprobs": {"token_logprobs": list(sample.logprobs or ())[: len(tokens)], "tokens": []},
        }  # fmt: skip
        if self.style == "token_ids" and body.get("return_token_ids"):
            choice["token_ids"] = tokens
        elif self.style == "logprobs" and body.get("return_tokens_as_token_ids"):
            choice["logprobs"]["tokens"] = [f"token_id:{token}" for token in tokens]
        return self._say(200, {"choices": [choice], "usage": {"completion_tokens": told}})

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


class Words:
    """A tokenizer of numbers."""

    eos_token_id = END

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Server, "bodies", [])
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def served(url: str, **options: Any) -> ServerEngine:
    return ServerEngine(f"{url}/v1/", Words(), **options)  # type: ignore[arg-type]


ASKED = [Request((1, 2), Params(temperature=0.7, seed=seed), 24) for seed in (1, 2, 5, 6)]  # all seeded


def due() -> list[tuple[int, ...]]:
    return [sample.token_ids for sample in OurEngine(Engine(target(), None)).generate(ASKED)]


@pytest.mark.parametrize(("style", "knows"), [("token_ids", VLLM), ("logprobs", OLD_VLLM), ("text", VLLM)])
def test_tokens_are_read_however_a_server_tells_them(
    style: str, knows: set[str], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole answers: the end of text is ignored, the server's own defaults are overruled."""
    monkeypatch.setattr(Server, "style", style)
    if style == "text":
        knows = knows | OLD_VLLM
    monkeypatch.setattr(Server, "knows", knows)
    engine = served(url, retokenise=style == "text")
    found = engine.generate(ASKED)
    assert [sample.token_ids for sample in found] == due() and engine.left_out == 0
    assert any(END in tokens[:-1] for tokens in due())
    for sample, right in zip(found, OurEngine(Engine(target(), None)).generate(ASKED), strict=True):
        assert sample.logprobs == pytest.approx(right.logprobs)


def test_a_strict_server_gets_only_the_fields_it_knows_and_refusals_are_remembered(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "knows", VLLM - {"min_p", "ignore_eos"})
    engine = served(url, together=1)
    engine.generate(ASKED[:1])
    tries = len(Server.bodies)
    engine.generate(ASKED[:1])
    assert tries == 3 and len(Server.bodies) == 4  # one try for each refused field, then none
    assert not Server.bodies[-1].keys() & {"min_p", "ignore_eos", "return_tokens_as_token_ids", "skip_special_tokens"}
    with pytest.raises(ValueError, match="min_p"):  # a setting that changes the law is not dropped
        engine._refused.clear()
        engine.generate([Request((1, 2), Params(min_p=0.1, seed=1), 4)])


def test_an_end_of_text_that_a_server_stops_at_and_hides_is_put_back(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "style", "text")
    monkeypatch.setattr(Server, "knows", VLLM - {"ignore_eos"} | OLD_VLLM - {"ignore_eos"})
    engine = served(url, retokenise=True)
    cut = [tokens[: tokens.index(END) + 1] if END in tokens else tokens for tokens in due()]
    assert [sample.token_ids for sample in engine.generate(ASKED)] == cut and engine.left_out == 0
    assert any(tokens[-1] == END for tokens in cut)


def test_llama_cpp_is_not_asked_to_forbid_the_end_of_text(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "owner", "llamacpp")
    served(url).generate(ASKED[:1])
    assert "ignore_eos" not in Server.bodies[-1]


def test_every_other_pair_of_requests_has_no_seed(url: str) -> None:
    asked = [Request((1, 2), Params(seed=seed), 2) for seed in range(1, 9)]
    served(url, together=1).generate(asked)
    assert ["seed" in body for body in Server.bodies] == [True, True, False, False] * 2


def test_answers_left_out_leave_the_audit_undecided(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which ones they are depends on their text: the bound on the others says nothing of the engine."""
    monkeypatch.setattr(Server, "style", "text")
    monkeypatch.setattr(Server, "knows", VLLM | OLD_VLLM)
    monkeypatch.setattr(Server, "miscounts", 3)
    settings = Settings(tokens=400, max_tokens=4, epsilon=0.9)
    verdict = audit(
        served(url, retokenise=True), Scorer(ModelConditionals(target())), [[1, 2], [3, 4]], settings, [Params()]
    )
    assert verdict.tests["left_out"] > 0 and verdict.verdict == "undecided"
    assert verdict.epsilon is not None and verdict.epsilon <= settings.epsilon


def test_a_server_that_hides_its_tokens_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "style", "text")
    monkeypatch.setattr(Server, "knows", VLLM | OLD_VLLM)
    with pytest.raises(ValueError, match="--retokenise"):
        served(url).generate(ASKED[:1])


def test_no_endpoint_at_all() -> None:
    with pytest.raises(ValueError, match="cannot be reached"):
        served("http://127.0.0.1:9", timeout_s=2)
