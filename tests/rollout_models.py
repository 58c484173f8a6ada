"""Tiny random models on disk for the sampler tests: no tokenizer, no download, milliseconds to make."""

from __future__ import annotations

from pathlib import Path

import torch

VOCAB = 500  # no multiple of the search's block of 128


def tiny_llama(path: Path, seed: int, sharpness: float = 1.0) -> Path:
    """Write a two-layer Llama with a tied head to ``path``; ``sharpness`` scales its logits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    torch.set_rng_state(state)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # the default initialisation gives nearly uniform distributions
        model.model.norm.weight.mul_(sharpness)
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a model written by :func:`tiny_llama`, tied head included."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
