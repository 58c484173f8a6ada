"""The token draw inside vLLM: this project's distribution and random numbers instead of vLLM's.

Why replace it: (1) temperature, top-k and top-p then mean exactly what ``spec.sampling`` says, ties included;
(2) a completion's random numbers depend on its seed and position alone, whereas vLLM's seeded generators advance on
every scheduled chunk and cannot be rewound on a CPU; (3) one uniform and a search replace Gumbel noise over the
whole vocabulary, the dearest part of a step after the matrix products; (4) vLLM's log-prob ranks, which nobody here
reads, need a C++ compiler at run time; (5) the log-probs stay here until their completion has ended, instead of passing
through vLLM as objects of their own, token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.sampler import Sampler as StockSampler

from onpolicy.rollouts.draw import draw_tokens, uniforms
from onpolicy.types import SamplingParams

SEED_KEY, NAME_KEY = "onpolicy_seed", "onpolicy_name"  # in SamplingParams.extra_args of a request


class KeyedSampler(StockSampler):
    """Draws every row's token from the processed distribution with the uniform of (request seed, position)."""

    def __init__(self, runner: Any, used_ids: int | None = None):
        super().__init__()
        self._runner, self._used = runner, used_ids
        self.params = SamplingParams()  # of the batch in progress: one set for all its requests
        self.logprobs: dict[str, list[float]] = {}  # by the requests' names, of the tokens drawn so far

    def forward(self, logits: torch.Tensor, sampling_metadata: Any, *_: Any, **__: Any) -> SamplerOutput:
        """logits [B, V] -> tokens [B, 1]; their log-probs are kept."""
        batch, requests = self._runner.input_batch, self._runner.requests
        count = batch.num_reqs
        keys = [requests[name].sampling_params.extra_args for name in batch.req_ids[:count]]
        positions = batch.num_tokens_no_spec[:count] - batch.num_prompt_tokens[:count]
        drawn = uniforms(np.array([key[SEED_KEY] for key in keys], dtype=np.uint64), positions)
        tokens, logprobs = draw_tokens(logits[:, : self._used], drawn, self.params)
        for key, position, logprob in zip(keys, positions.tolist(), logprobs.tolist(), strict=True):
            kept = self.logprobs.setdefault(key[NAME_KEY], [])
            # A prefill in pieces draws after each of them, and what it drew before the last one is dropped.
            kept[position:] = [logprob]
        return SamplerOutput(sampled_token_ids=tokens.to(torch.int32)[:, None], logprobs_tensors=None)


def install(runner: Any, used_ids: int | None = None) -> KeyedSampler:
    """Give ``runner`` (vLLM's V1 model runner) a :class:`KeyedSampler`. ValueError for a runner of another kind.

    ``used_ids``: of the tokenizer; rows of the output beyond them are never drawn.
    """
    if not isinstance(getattr(runner, "sampler", None), StockSampler):
        raise ValueError(
            f"{type(runner).__name__} of this vLLM does not sample through vllm.v1.sample.Sampler: "
            "set VLLM_USE_V2_MODEL_RUNNER=0, or use the transformers sampler"
        )
    runner.sampler = KeyedSampler(runner, used_ids)
    return runner.sampler
