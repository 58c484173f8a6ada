"""vLLM offline, in a process of its own: plain, with a draft model, or with its n-gram lookup."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

from spec.audit.sample import Sample
from spec.request import Request

REFUSED_WITH_DRAFTS = frozenset({"min_p", "logit_bias", "allowed_token_ids"})


class VllmEngine:
    """Start it with ``with``: the process lives as long as the block.

    Args:
        target: model directory. draft: a model directory, ``ngram``, or None for no drafts.
        length: tokens to draft. drafting: ``probabilistic`` or ``greedy`` (vLLM's own default).
        repaired: False leaves vLLM as it is installed, without this project's plugin.
        options: further arguments of vLLM's ``EngineArgs``.
    """

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        *,
        length: int = 3,
        drafting: str = "probabilistic",
        repaired: bool = True,
        **options: Any,
    ):
        self.name = f"vllm {'plain' if draft is None else draft if draft == 'ngram' else 'draft_model'}"
        self.name += "" if repaired else ", unrepaired"
        self.unsupported = REFUSED_WITH_DRAFTS if draft else frozenset({"allowed_token_ids"})
        speculation: dict[str, Any] | None = None
        if draft == "ngram":
            speculation = {"method": "ngram", "num_speculative_tokens": length, "prompt_lookup_min": 1}
        elif draft is not None:
            speculation = {"method": "draft_model", "model": draft, "num_speculative_tokens": length}
            speculation["draft_sample_method"] = drafting
        self._options = {"model": target, "max_num_seqs": 32, "speculative_config": speculation, **options}
        self._environment = {} if repaired else {"VLLM_PLUGINS": ""}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spec.audit.engines.vllm_child"],
            env={**os.environ, **self._environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._ask(self._options)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # the end of its work
            self._process.wait(timeout=60)

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """End-of-text tokens are ignored. Raises RuntimeError if vLLM dies, with its standard error above."""
        asked = [{"prompt": list(r.prompt_ids), "max_tokens": r.max_tokens, **_fields(r)} for r in requests]
        return [
            Sample(tuple(r.prompt_ids), tuple(tokens), r.params)
            for r, tokens in zip(requests, self._ask(asked), strict=True)
        ]

    def _ask(self, message: Any) -> Any:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError(f"{self.name} is not running: use it in a with block")
        process.stdin.write(json.dumps(message) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {process.wait()}: see its messages above")
        return json.loads(line)


def _fields(request: Request) -> dict[str, Any]:
    """As vLLM's SamplingParams names them."""
    p = asdict(request.params)
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    fields = {name: p[name] for name in names}
    if request.params.top_k > 0:
        fields["top_k"] = request.params.top_k
    if request.params.logit_bias:
        fields["logit_bias"] = dict(request.params.logit_bias)
    return fields
