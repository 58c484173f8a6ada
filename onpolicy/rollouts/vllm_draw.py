"""The token draw inside vLLM: this project's distribution and random numbers instead of vLLM's.

Why replace it: (1) temperature, top-k and top-p then mean exactly what ``spec.sampling`` says, ties included;
(2) a completion's random numbers depend on its seed and position alone, whereas vLLM's seeded generators advance on
every scheduled chunk and cannot be rewound on a CPU; (3) one uniform and a search replace Gumbel noise over the
whole vocabulary, the dearest part of a step after the matrix products; (4) vLLM's log-prob ranks, which nobody here
reads, need a C++ compiler at run time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler as StockSampler

from onpolicy.rollouts.draw import draw_tokens, uniforms
from onpolicy.types import SamplingParams

SEED_KEY = "onpolicy_seed"  # in SamplingParams.extra_args of a request


class KeyedSampler(StockSampler):
    """Draws every row's token from the processed distribution with the uniform of (request seed, position)."""

    def __init__(self, runner: Any, used_ids: int | None = None):
        super().__init__()
        self._runner, self._used = runner, used_ids
        self.params = SamplingParams()  # of the batch in progress: one set for all its requests

    def forward(self, logits: torch.Tensor, sampling_metadata: Any, *_: Any, **__: Any) -> SamplerOutput:
        """logits [B, V] -> tokens [B, 1] and their log-probs [B, 1]."""
        tokens, logprobs = draw_tokens(logits[:, : self._used], self._uniforms(), self.params)
        return SamplerOutput(
            sampled_token_ids=tokens.to(torch.int32)[:, None],
            logprobs_tensors=LogprobsTensors(
                logprob_token_ids=tokens.to(torch.int32)[:, None],
                logprobs=logprobs[:, None],
                selected_token_ranks=torch.zeros_like(tokens),
            ),
        )

    def _uniforms(self) -> np.ndarray:
        batch, requests = self._runner.input_batch, self._runner.requests
        count = batch.num_reqs
        seeds = [requests[name].sampling_params.extra_args[SEED_KEY] for name in batch.req_ids[:count]]
        positions = batch.num_tokens_no_spec[:count] - batch.num_prompt_tokens[:count]
        return uniforms(np.array(seeds, dtype=np.uint64), positions)


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
