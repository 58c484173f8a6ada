"""Any OpenAI-compatible endpoint; the target is local, so the server need not report log-probs."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from spec.audit.sample import Sample
from spec.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ServerEngine:
    """``POST /v1/completions`` with token ids as prompt.

    Token ids of the answer are those the server returns (``return_token_ids``, which vLLM and this project's server
    know), else the tokens of ``logprobs`` written as ids. Where a server gives neither, the text is tokenised again if
    ``retokenise``, and an answer is used only as far as this is sure to be what was drawn: not at all unless the
    number of tokens is the server's own. Leaving some out is itself a small bias, on texts with unusual tokens.

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
        self._model = model or self._call("models", None)["data"][0]["id"]
        self.left_out = 0  # answers whose tokens are not sure

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Raises ValueError where the server cannot be reached, refuses, or does not say which tokens it drew."""
        with ThreadPoolExecutor(self._together) as pool:
            found = list(pool.map(self._one, requests))
        return [Sample(tuple(r.prompt_ids), tuple(t), r.params) for r, t in zip(requests, found, strict=True)]

    def _one(self, request: Request) -> list[int]:
        p = request.params
        body: dict[str, Any] = {
            "model": self._model, "prompt": list(request.prompt_ids), "max_tokens": request.max_tokens,
            "temperature": p.temperature, "top_p": p.top_p, "seed": p.seed % 2**31, "return_token_ids": True,
            "logprobs": 0, "return_tokens_as_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        if p.penalised:
            body |= {"presence_penalty": p.presence_penalty, "frequency_penalty": p.frequency_penalty}
            body |= {"repetition_penalty": p.repetition_penalty}
        body |= {"top_k": p.top_k} if p.top_k > 0 else {}
        body |= {"min_p": p.min_p} if p.min_p else {}
        body |= {"logit_bias": {str(t): b for t, b in p.logit_bias.items()}} if p.logit_bias else {}
        return self._tokens(self._call("completions", body))

    def _tokens(self, answer: dict[str, Any]) -> list[int]:
        choice = answer["choices"][0]
        if choice.get("token_ids") is not None:
            return [int(token) for token in choice["token_ids"]]
        said = (choice.get("logprobs") or {}).get("tokens") or []
        if said and all(str(token).startswith("token_id:") for token in said):
            return [int(token.removeprefix("token_id:")) for token in said]
        if not self._retokenise:
            raise ValueError(
                f"{self.name} does not say which tokens it drew (neither return_token_ids nor "
                "return_tokens_as_token_ids): give --retokenise to tokenise its text again, which is less sure"
            )
        tokens = list(self._tokenizer(choice["text"], add_special_tokens=False)["input_ids"])
        told = (answer.get("usage") or {}).get("completion_tokens")
        if told != len(tokens):
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
            raise ValueError(f"{self.base}/{path} answered {error.code}: {error.read()[:300]!r}") from error
        except OSError as error:
            raise ValueError(f"{self.base} cannot be reached ({error}): is the server up?") from error
