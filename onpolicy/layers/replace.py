"""Which modules of a transformers model are computed by our kernels, frozen or trained.

Linear layers, MLPs with their SiLU, RMS norms, and attention with its projections and rotary embeddings. What a module
does is guessed from its name and parts, so each is asked before and after on the same input, and stays as it is where
the answers differ by more than rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from onpolicy.attention import NAME, Layout, attend_laid_out
from onpolicy.layers.packed import PackedGate, PackedLinear, rms_norm, supports
from onpolicy.layers.rotary import lay_out
from onpolicy.layers.trained import gated, project
from onpolicy.layers.trained import rms_norm as trained_rms_norm
from onpolicy.models import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = 0.01  # of a module's output, relative to its root mean square: two roundings to bf16 or three
_LOOSE = 0.02  # of attention's, whose scores are rounded before their exponentials are taken
_ROWS = 5  # that a module is asked about


@torch.no_grad()
def pack_layers(model: PreTrainedModel) -> int:
    """Replace what can be replaced in a frozen decoder's layers, in place; how many modules were.

    For a model that is neither trained, nor saved, nor copied any more: its original weights are given up.
    """
    layers = getattr(base_model(model).get_decoder(), "layers", None)
    count = _visit(layers, torch.bfloat16, _pack) if isinstance(layers, nn.ModuleList) else 0
    if count:
        # What is left may lie in the mapped file of the checkpoint, and keep all of it in memory.
        for kept in model.parameters():
            kept.data = kept.data.clone()
    return count


@torch.no_grad()
def quicken_layers(model: nn.Module) -> int:
    """Let a decoder with float32 weights compute by our kernels under autocast to bf16; how many modules do.

    Modules, parameters and their names stay; elsewhere than under autocast they compute as they did.
    """
    with torch.autocast("cpu", torch.bfloat16):
        return _visit(base_model(model).get_decoder(), torch.float32, _quicken)


def _visit(module: nn.Module, dtype: torch.dtype, change: Callable[[nn.Module, str, _Parts], bool]) -> int:
    """Change what is recognised below a module, largest first; how many modules were."""
    count = 0
    for name, child in list(module.named_children()):
        parts = _recognise(child, dtype)
        if parts is None:
            count += _visit(child, dtype, change)
        elif change(module, name, parts):
            count += 1
        else:
            warnings.warn(
                f"{type(child).__name__} by our kernels does not do what it did; it is used as it is, more slowly",
                stacklevel=4,
            )
            count += _visit(child, dtype, change)
    return count


def _pack(parent: nn.Module, name: str, parts: _Parts) -> bool:
    module = getattr(parent, name)
    packed = _FROZEN[type(parts)](module, parts)
    if agrees := _agree(module, packed, parts):
        setattr(parent, name, packed)
    return agrees


def _quicken(parent: nn.Module, name: str, parts: _Parts) -> bool:
    module = getattr(parent, name)
    quick = partial(_TRAINED[type(parts)], module, parts, module.forward)
    if agrees := _agree(module, quick, parts):
        module.forward = quick
    return agrees


def _agree(module: Callable[..., Any], other: Callable[..., Any], parts: _Parts) -> bool:
    """Whether both give the same, up to rounding."""
    x = torch.randn(1, _ROWS, parts.width, generator=torch.Generator().manual_seed(0)).bfloat16()
    asked: list[dict[str, Any]] = [{}]
    tolerance = _LOOSE if isinstance(parts, _AttentionParts) else _TOLERANCE
    if isinstance(parts, _AttentionParts):
        x *= parts.sharp_at()
        angles = torch.arange(_ROWS)[:, None] / torch.arange(1, parts.size // 2 + 1)
        turns = tuple(f(torch.cat([angles, angles], -1))[None].to(parts.turned) for f in (torch.cos, torch.sin))
        asked = [{"position_embeddings": turns, "attention_mask": None, **more} for more in ({}, _one_row())]
    for options in asked:
        before, after = (_first(f(x, **options)).float() for f in (module, other))
        if before.shape != after.shape or not (after - before).norm() <= tolerance * before.norm():
            return False
    return True


def _one_row() -> dict[str, Layout]:
    return {"shared_prompts": Layout.plain(1, _ROWS)}


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


class _LinearParts(NamedTuple):
    layer: nn.Linear

    @property
    def width(self) -> int:
        return self.layer.in_features


class _MLPParts(NamedTuple):
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def width(self) -> int:
        return self.gate.in_features


class _NormParts(NamedTuple):
    weight: Tensor
    epsilon: float

    @property
    def width(self) -> int:
        return len(self.weight)


class _AttentionParts(NamedTuple):
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    size: int  # of a head
    scale: float

    @property
    def width(self) -> int:
        return self.query.in_features

    @property
    def heads(self) -> int:
        return self.query.out_features // self.size

    @property
    def turned(self) -> torch.dtype:
        """Of the rotary embedding's sines: that of the model's states."""
        return self.query.weight.dtype

    def sharp_at(self) -> float:
        """How large normal inputs have to be for scores that differ by 2: nearly uniform attention tells nothing."""
        spread = [layer.weight.float().pow(2).sum(-1).mean().sqrt().item() for layer in (self.query, self.key)]
        return (2 / max(spread[0] * spread[1] * self.size**0.5 * self.scale, 1e-12)) ** 0.5

    def attend(self, states: Tensor, turns: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """states [R, L, (H + 2 K) D] -> [R, L, H D]."""
        attended = attend_laid_out(*lay_out(states, *turns, layout, self.heads), self.scale, layout)
        return attended.view(*states.shape[:-1], -1)


_Parts = _LinearParts | _MLPParts | _NormParts | _AttentionParts


def _recognise(module: nn.Module, dtype: torch.dtype) -> _Parts | None:
    """The parts of a module of a known kind, all weights of this dtype."""
    if _plain(module, dtype):
        return _LinearParts(module)  # type: ignore[arg-type]
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    if silu and all(_plain(part, dtype) and part.bias is None for part in parts):  # type: ignore[union-attr]
        return _MLPParts(*parts)  # type: ignore[arg-type]
    if type(module).__name__.endswith("RMSNorm"):
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if weight is not None and isinstance(epsilon, float) and supports(weight[None], dtype):
            return _NormParts(weight, epsilon)
    return _attention(module, dtype)


def _attention(module: nn.Module, dtype: torch.dtype) -> _AttentionParts | None:
    """The parts of plain attention: four linear layers, turned in whole heads, without a window."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    parts = [getattr(module, name, None) for name in names]
    if not all(_plain(part, dtype) for part in parts) or {name for name, _ in module.named_children()} != set(names):
        return None
    config, size, scale = (getattr(module, name, None) for name in ("config", "head_dim", "scaling"))
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    implementation = getattr(config, "_attn_implementation", None)
    known = implementation == NAME and isinstance(scale, float) and window is None
    if not known or getattr(module, "attention_dropout", False) or not isinstance(size, int) or size % 2:
        return None
    return _AttentionParts(*parts, size, scale)  # type: ignore


def _plain(module: nn.Module | None, dtype: torch.dtype) -> bool:
    """Whether it is a linear layer that our products take."""
    return type(module) is nn.Linear and supports(module.weight, dtype) and module.out_features % 2 == 0


class _Linear(nn.Module):
    def __init__(self, module: nn.Module, parts: _LinearParts) -> None:
        super().__init__()
        self._product = PackedLinear(parts.layer.weight, parts.layer.bias)
        self.register_buffer("weight", self._product.memory(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


class _MLP(nn.Module):
    def __init__(self, module: nn.Module, parts: _MLPParts) -> None:
        super().__init__()
        self._gate, self._down = PackedGate(parts.gate.weight, parts.up.weight), PackedLinear(parts.down.weight)
        self.register_buffer("gate_up", self._gate.memory(), persistent=False)
        self.register_buffer("down", self._down.memory(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self._gate(x))


class _RMSNorm(nn.Module):
    def __init__(self, module: nn.Module, parts: _NormParts) -> None:
        super().__init__()
        self._weight, self._epsilon = parts.weight.detach().clone(), parts.epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight, self._epsilon)


class _Attention(nn.Module):
    def __init__(self, module: nn.Module, parts: _AttentionParts) -> None:
        super().__init__()
        layers = parts[:3]
        bias = _joined_bias(layers, torch.bfloat16)
        self._states = PackedLinear(torch.cat([layer.weight for layer in layers]), bias)
        self._out = PackedLinear(parts.out.weight, parts.out.bias)
        self.register_buffer("states", self._states.memory(), persistent=False)
        self.register_buffer("out", self._out.memory(), persistent=False)
        self._attend, self.heads, self.scaling = parts.attend, parts.heads, parts.scale
        # What transformers' attention functions and caches ask of a module.
        self.config: Any = module.config
        self.layer_idx, self.is_causal = module.layer_idx, True
        self.num_key_value_groups = parts.query.out_features // parts.key.out_features

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        shared_prompts: Layout | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        states = self._states(hidden_states)
        if shared_prompts is not None:
            return self._out(self._attend(states, position_embeddings, shared_prompts)), None
        from transformers import AttentionInterface

        rows, length, _ = states.shape
        plain = lay_out(states, *position_embeddings, Layout.plain(rows, length), self.heads)
        query, key, value = (x.transpose(1, 2) for x in plain)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = AttentionInterface()[self.config._attn_implementation]
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **options
        )
        return self._out(attended.reshape(rows, length, -1)), weights


def _trained_linear(module: nn.Linear, parts: _LinearParts, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    return _projected(x.bfloat16(), module) if _applies(x) else original(x)


def _trained_mlp(module: nn.Module, parts: _MLPParts, original: Callable[..., Tensor], x: Tensor) -> Tensor:
    if not _applies(x):
        return original(x)
    return _projected(gated(_projected(x.bfloat16(), parts.gate, parts.up)), parts.down)


def _trained_norm(
    module: nn.Module, parts: _NormParts, original: Callable[..., Tensor], hidden_states: Tensor
) -> Tensor:
    if not _applies(hidden_states):
        return original(hidden_states)
    return trained_rms_norm(hidden_states.float(), parts.weight, parts.epsilon)


def _trained_attention(
    module: nn.Module, parts: _AttentionParts, original: Callable[..., Any], hidden_states: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    layout = options.get("shared_prompts")
    if layout is None or not _applies(hidden_states):
        return original(hidden_states, **options)
    states = _projected(hidden_states.bfloat16(), *parts[:3])
    return _projected(parts.attend(states, options["position_embeddings"], layout), parts.out), None


def _projected(x: Tensor, *layers: nn.Linear) -> Tensor:
    out, bias = project(x, *(layer.weight for layer in layers)), _joined_bias(layers, torch.bfloat16)
    return out if bias is None else out + bias


def _joined_bias(layers: Sequence[nn.Linear], dtype: torch.dtype) -> Tensor | None:
    """The biases of layers whose outputs stand beside one another; None where none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    each = (layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers)
    return torch.cat([bias.to(dtype) for bias in each])


def _applies(x: Tensor) -> bool:
    """Whether matrix products run in bf16 here."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


_FROZEN: dict[type, Callable[..., nn.Module]] = {
    _LinearParts: _Linear,
    _MLPParts: _MLP,
    _NormParts: _RMSNorm,
    _AttentionParts: _Attention,
}
_TRAINED: dict[type, Callable[..., Any]] = {
    _LinearParts: _trained_linear,
    _MLPParts: _trained_mlp,
    _NormParts: _trained_norm,
    _AttentionParts: _trained_attention,
}
