"""Any OpenAI-compatible endpoint; the target is local, so the server need not report log-probs."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from spec.audit.sample import Sample, seeded
from spec.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Fields beyond OpenAI's own. All are sent, neutral ones too, because a server may have defaults of its own (vLLM takes
# the checkpoint's generation_config); -1 switches top_k off everywhere. One that the server refuses is left out where
# that changes nothing.
_NEUTRAL: dict[str, Any] = {
    "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "ignore_eos": True, "return_token_ids": True, "logprobs": 0,
}  # fmt: skip
# Sent only once a server has answered without token_ids: vLLM's older way, which others refuse
_AS_TEXT: dict[str, Any] = {"return_tokens_as_token_ids": True, "skip_special_tokens": False}


class ServerEngine:
    """``POST /v1/completions`` with token ids as prompt; every other pair of requests without a seed.

    Token ids of the answer are those the server returns (``return_token_ids``, which vLLM and this project's server
    know), else the tokens of ``logprobs`` written as ids. Where a server gives neither, the text is tokenised again if
    ``retokenise``. A server that stops at the end of text although asked not to, and does not show that token, has it
    added. An answer is used only if it has as many tokens as the server says; others are counted in ``left_out``, and
    an audit with any is undecided: which ones they are depends on their text.

    Args:
        url: with or without /v1. model: its name on the server, None: the first it lists.
    """

    unsupported = frozenset({"allowed_token_ids"})

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str | None = None,
        retokenise: bool = False,
        together: int = 8,
        timeout_s: float = 300.0,
    ):
        self.base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self.name, self._tokenizer, self._timeout = url, tokenizer, timeout_s
        self._retokenise, self._together = retokenise, together
        served = self._call("models", None)["data"][0]
        self._model = model or served["id"]
        # llama.cpp means something else by it: the end of text can then not be said
        self._refused: set[str] = {"ignore_eos"} if served.get("owned_by") == "llamacpp" else set()
        self._as_text: dict[str, Any] = {}
        self.left_out = 0  # answers whose tokens are not sure

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Raises ValueError where the server cannot be reached, refuses, or does not say which tokens it drew."""
        with ThreadPoolExecutor(self._together) as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Sample:
        as_text = self._as_text
        answer = self._complete(request, as_text)
        if _token_ids(answer) is None and not as_text:
            self._as_text = _AS_TEXT  # also of other threads' next requests
            answer = self._complete(request, _AS_TEXT)
        tokens = self._tokens(answer)
        said = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        logprobs = tuple(map(float, said)) if len(said) == len(tokens) and None not in said else None
        return Sample(tuple(request.prompt_ids), tuple(tokens), request.params, logprobs=logprobs)

    def _complete(self, request: Request, as_text: dict[str, Any]) -> dict[str, Any]:
        """Leaves out what the server has refused so far, and tries again for every field that it names in a refusal."""
        p = request.params
        body: dict[str, Any] = {
            "model": self._model, "prompt": list(request.prompt_ids), "max_tokens": request.max_tokens,
            "temperature": p.temperature, "top_p": p.top_p,
        }  # fmt: skip
        extras = _NEUTRAL | as_text
        for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
            extras[name] = getattr(p, name)
        if p.top_k > 0:
            extras["top_k"] = p.top_k
        if seeded(p.seed):
            body["seed"] = p.seed % 2**31
        if p.logit_bias:
            body["logit_bias"] = {str(t): b for t, b in p.logit_bias.items()}
        while True:
            without = set(self._refused)  # other threads add to it
            try:
                return self._call("completions", body | {k: v for k, v in extras.items() if k not in without})
            except Refused as refusal:
                named = {name for name in extras if re.search(rf"\b{name}\b", str(refusal))} - without
                if not named or any(extras[name] != (_NEUTRAL | _AS_TEXT)[name] for name in named):
                    raise
                self._refused |= named

    def _tokens(self, answer: dict[str, Any]) -> list[int]:
        choice = answer["choices"][0]
        tokens = _token_ids(answer)
        if tokens is None and not self._retokenise:
            raise ValueError(
                f"{self.name} does not say which tokens it drew (neither return_token_ids nor "
                "return_tokens_as_token_ids): give --retokenise to tokenise its text again, which is less sure"
            )
        sure = tokens is not None
        if tokens is None:
            tokens = list(self._tokenizer(choice["text"], add_special_tokens=False)["input_ids"])
        told = (answer.get("usage") or {}).get("completion_tokens")
        end = self._tokenizer.eos_token_id
        if choice.get("finish_reason") == "stop" and told == len(tokens) + 1 and end is not None:
            tokens = [*tokens, int(end)]
        if told != len(tokens) and not (sure and told is None):
            self.left_out += 1
            return []
        return tokens

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.base}/{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            kind = Refused if error.code in (400, 422) else ValueError
            raise kind(f"{self.base}/{path} answered {error.code}: {error.read()[:2000]!r}") from error
        except OSError as error:
            raise ValueError(f"{self.base} cannot be reached ({error}): is the server up?") from error


class Refused(ValueError):
    """The server does not take this request."""


def _token_ids(answer: dict[str, Any]) -> list[int] | None:
    """None: the server does not say."""
    choice = answer["choices"][0]
    if choice.get("token_ids") is not None:
        return [int(token) for token in choice["token_ids"]]
    said = (choice.get("logprobs") or {}).get("tokens") or []
    if said and all(str(token).startswith("token_id:") for token in said):
        return [int(token.removeprefix("token_id:")) for token in said]
    return None
