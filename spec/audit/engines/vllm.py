"""vLLM offline, in a process of its own: plain, with a draft model, or with its n-gram lookup."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self

from spec.audit.sample import Sample, seeded
from spec.request import Request

_PATIENCE_S = 60.0
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
        if draft and not repaired:  # it reads top_k from memory never written, and dies of an index out of bounds
            self.unsupported |= {"top_k"}
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
        """Raises ValueError where vLLM is missing or does not start with these options."""
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("vLLM is not installed here: install it, or audit a running server by its URL")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "spec.audit.engines.vllm_child"],
            env={**os.environ, **self._environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            self._ask(self._options)
        except RuntimeError as error:
            raise ValueError(f"vLLM does not start: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # the end of its work
            try:
                self._process.wait(timeout=_PATIENCE_S)
            except subprocess.TimeoutExpired:  # it hangs
                self._process.kill()
                self._process.wait()

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """End-of-text tokens are ignored. Every other pair of requests draws from the random state of the process: a
        generator for each request would hide faults of that path.

        Raises RuntimeError if vLLM dies, with its standard error above.
        """
        asked = [{"prompt": list(r.prompt_ids), "max_tokens": r.max_tokens, **_fields(r)} for r in requests]
        return [
            Sample(tuple(r.prompt_ids), tuple(ids), r.params, None, tuple(said) if len(said) == len(ids) else None)
            for r, (ids, said) in zip(requests, self._ask(asked), strict=True)
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
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    fields = {name: p[name] for name in names}
    if seeded(request.params.seed):
        fields["seed"] = request.params.seed
    if request.params.top_k > 0:
        fields["top_k"] = request.params.top_k
    if request.params.logit_bias:
        fields["logit_bias"] = dict(request.params.logit_bias)
    return fields
