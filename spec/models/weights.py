"""A Llama-like checkpoint taken apart for :mod:`spec.models.decoder`.

Shape legend: V vocabulary, C hidden size, H heads, K key heads, D head size, F width of the MLP, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on how long the text is


class UnsupportedModel(ValueError):
    """A model the fast forward pass does not know; transformers' own can run it."""


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Matrices in the model's dtype, norms float32."""

    attention_norm: Tensor  # [C]
    qkv: Tensor  # [(H + 2 K) D, C]
    qkv_bias: Tensor | None  # [(H + 2 K) D]
    query_norm: Tensor | None  # [D], of every head (Qwen3)
    key_norm: Tensor | None  # [D]
    output: Tensor  # [C, H D]
    mlp_norm: Tensor  # [C]
    gate_up: Tensor  # [2 F, C]
    down: Tensor  # [C, F]


@dataclass(frozen=True)
class DecoderWeights:
    """A whole model."""

    name: str
    embedding: Tensor  # [V, C]
    layers: list[LayerWeights]
    norm: Tensor  # [C]
    head: Tensor  # [V, C], the embedding itself where they are tied
    heads: int
    key_heads: int
    head_size: int
    epsilon: float  # of the norms
    max_positions: int
    end_tokens: tuple[int, ...]
    num_parameters: int
    rotary: Any  # (any [*, C], positions [1, P]) -> cos and sin [1, P, D]

    def angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P, D] float32 of the rotation at each position."""
        device = self.embedding.device
        cos, sin = self.rotary(torch.zeros(1, device=device), torch.arange(positions, device=device)[None])
        return cos[0].float().contiguous(), sin[0].float().contiguous()


@torch.no_grad()
def read(model: PreTrainedModel, name: str) -> DecoderWeights:
    """Views and fused copies of the weights of a transformers model.

    Raises UnsupportedModel, saying why, for a model that computes anything else than the decoder does.
    """
    config = model.config
    _check(model)
    layers = [_layer(layer) for layer in model.model.layers]
    embedding = model.get_input_embeddings().weight.detach()
    eos = model.generation_config.eos_token_id if model.generation_config else config.eos_token_id
    return DecoderWeights(
        name=name,
        embedding=embedding,
        layers=layers,
        norm=_norm(model.model.norm),
        head=model.get_output_embeddings().weight.detach(),
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        epsilon=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        end_tokens=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        rotary=model.model.rotary_emb,
    )


def _layer(layer: Any) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [linear.bias for linear in three]
    return LayerWeights(
        attention_norm=_norm(layer.input_layernorm),
        qkv=torch.cat([linear.weight for linear in three]).detach(),
        qkv_bias=None if biases[0] is None else torch.cat(biases).detach(),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=attention.o_proj.weight.detach(),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach(),
        down=mlp.down_proj.weight.detach(),
    )


def _norm(module: Any) -> Tensor:
    return module.weight.detach().float()


def _check(model: PreTrainedModel) -> None:
    config, kind = model.config, type(model).__name__
    if kind not in ARCHITECTURES:
        raise UnsupportedModel(f"{kind} is not one of {', '.join(ARCHITECTURES)}")
    sliding = getattr(config, "layer_types", None) or []
    if (getattr(config, "sliding_window", None) and not sliding) or any(kind != "full_attention" for kind in sliding):
        raise UnsupportedModel("it attends to a sliding window")
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"its activation is {config.hidden_act}")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _FIXED_ROPE:
        raise UnsupportedModel(f"its rotary embedding is {rope}")
    first = model.model.layers[0]
    biased = [first.self_attn.o_proj, first.mlp.gate_proj, first.mlp.up_proj, first.mlp.down_proj]
    if any(linear.bias is not None for linear in (*biased, model.get_output_embeddings())):
        raise UnsupportedModel("it has biases beyond those of queries, keys and values")
