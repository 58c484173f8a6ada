"""The engine that a configuration asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from onpolicy.models import load_causal_lm
from onpolicy.prepare import Prepared, engine_name
from onpolicy.types import Source

if TYPE_CHECKING:
    from onpolicy.rollouts.base import Sampler


def open_sampler(prepared: Prepared, model_dir: str, source: Source, device: torch.device) -> Sampler:
    """On a checkpoint directory, with room for the longest prompt and answer of the run. vLLM chooses its device."""
    config = prepared.config.rollouts
    prompts = [*prepared.train_prompts, *prepared.heldout_prompts]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    tokens = max(prepared.config.sampling.max_tokens, prepared.config.evaluation.max_tokens)
    shared: dict[str, Any] = {
        "source": source, "max_model_len": longest + tokens, "max_num_seqs": config.max_num_seqs,
        "used_ids": prepared.used_ids,
    }  # fmt: skip
    if engine_name(prepared.config) == "transformers":
        from onpolicy.rollouts.transformers_sampler import TransformersSampler

        return TransformersSampler(load_causal_lm(model_dir, getattr(torch, config.dtype), device), **shared)
    from onpolicy.rollouts.vllm_local import VLLMSampler

    return VLLMSampler(model_dir, dtype=config.dtype, kv_cache_gib=config.kv_cache_gib, **shared)
