"""The process of :class:`spec.audit.engines.vllm.VllmEngine`: JSON lines in, JSON lines out, until its input ends."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

Answer = tuple[list[int], list[float]]  # token ids, and the log-prob of each as vLLM reports it


def main() -> None:
    """First line: options of the engine, answered by null; every other: requests, answered by :data:`Answer` each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is not an answer
    from spec.vllm_engine import start_engine, stop_engine

    options = json.loads(sys.stdin.readline())
    engine = start_engine(options.pop("kv_cache_gib", 1.0), **options)
    _answer(answers, None)
    for line in sys.stdin:
        _answer(answers, _complete(engine, json.loads(line)))
    stop_engine(engine)


def _complete(engine: Any, requests: list[dict[str, Any]]) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    for index, request in enumerate(requests):
        prompt = request.pop("prompt")
        if "logit_bias" in request:
            request["logit_bias"] = {int(token): bias for token, bias in request["logit_bias"].items()}
        params = SamplingParams(detokenize=False, ignore_eos=True, logprobs=0, **request)
        engine.add_request(str(index), tokens_input(prompt), params)
    completions: list[Answer] = [([], []) for _ in requests]
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            reported = output.outputs[0].logprobs or []
            logprobs = [of[token].logprob for token, of in zip(tokens, reported, strict=False)]
            completions[int(output.request_id)] = tokens, logprobs
    return completions


def _answer(stream: TextIO, message: Any) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    main()
