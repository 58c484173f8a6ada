"""One backend, tried: does it pass its start-up self-test, and how fast is it on a few prompts?

``python -m spec.serve.trial torch|vllm`` reads the server's options as a JSON object from its standard input and prints
one with ``tokens_per_second`` as its last line, or ends with status 1 and the reason as the last line on stderr.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spec import loading
from spec.serve.backend import vllm_speculation

if TYPE_CHECKING:
    from spec.request import Request

TOGETHER, TOKENS = 4, 48  # requests at once, and tokens of each answer
_CONTEXT = 512
_QUESTIONS = (
    "Tom has 3 apples and buys 4 more. How many apples has he?",
    "Write a short poem about rain in the city.",
    "Explain to a child why the sky is blue.",
    "Summarise: the cat sat on the mat, and the dog sat on the cat.",
    "A train leaves at 9:40 and takes 85 minutes. When does it arrive?",
    "Write a Python function that reverses a list.",
    "What is the difference between weather and climate?",
    "List five things to pack for a walk in the mountains.",
)


def main() -> int:
    name, options = sys.argv[1], Namespace(**json.load(sys.stdin))
    try:
        rate = {"torch": torch_rate, "vllm": vllm_rate}[name](options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps({"tokens_per_second": rate}))
    return 0


def torch_rate(options: Namespace) -> float:
    """Tokens a second of our engine. Raises ValueError where its self-test fails."""
    from spec.engine import Engine
    from spec.serve.start import load

    parts = load(options)
    engine = Engine(
        parts.target, parts.tested_drafter(options.draft), draft_length=loading.draft_length(options.draft_length),
        mode=options.mode, max_running=options.max_running, end_tokens=(),
    )  # fmt: skip

    def generate(requests: Sequence[Request]) -> int:
        results = engine.generate(requests)
        for result in results:
            if result.completions[0].error is not None:
                raise ValueError(result.completions[0].error)
        return sum(len(result.completions[0].token_ids) for result in results)

    return _timed(generate, options)


def vllm_rate(options: Namespace) -> float:
    """Tokens a second of vLLM's engine. Raises RuntimeError where it does not start: its plugin tests it then."""
    from transformers import AutoConfig

    from spec.audit.engines.vllm import VllmEngine

    longest = AutoConfig.from_pretrained(options.target).get_text_config().max_position_embeddings
    with VllmEngine(
        options.target, speculative_config=vllm_speculation(options), dtype=options.dtype, load_format="safetensors",
        max_num_seqs=options.max_running, max_model_len=min(_CONTEXT, options.max_model_len or longest, longest),
    ) as engine:  # fmt: skip
        return _timed(lambda requests: sum(len(s.token_ids) for s in engine.generate(requests)), options)


def _timed(generate: Callable[[Sequence[Request]], int], options: Namespace) -> float:
    """Of the second half of the questions, when the first has warmed everything up and shown what drafts are worth."""
    requests = _requests(options)
    generate(requests[:TOGETHER])
    began = time.perf_counter()
    tokens = generate(requests[TOGETHER:])
    return tokens / (time.perf_counter() - began)


def _requests(options: Namespace) -> list[Request]:
    from spec.params import Params
    from spec.request import Request

    tokenizer = loading.open_tokenizer(options.target)
    prompts = [loading.encode_prompt(tokenizer, question) for question in _QUESTIONS]
    return [Request(prompt, Params(seed=i), TOKENS) for i, prompt in enumerate(prompts)]


if __name__ == "__main__":
    sys.exit(main())
