"""A frozen model's layers on weights laid out for this CPU: its scores are half of a step's products.

The modules of a transformers model are replaced one by one: linear layers, the gate of an MLP with its SiLU, RMS
norms. What a module does is guessed from its name and parts, so each is asked before and after on the same input, and
stays where the answers differ by more than rounding.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onpolicy.models import base_model
from onpolicy.packed_linear import PackedGate, PackedLinear, rms_norm, supports

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOLERANCE = 0.01  # of a module's output, relative to its root mean square: two roundings to bf16 or three
_ROWS = 5  # that a module is asked about


@torch.no_grad()
def pack_layers(model: PreTrainedModel) -> int:
    """Replace what can be replaced in the decoder's layers, in place; how many modules were.

    For a model that is neither trained, nor saved, nor copied any more: its original weights are given up.
    """
    layers = getattr(base_model(model).get_decoder(), "layers", None)
    count = _pack_inside(layers) if isinstance(layers, nn.ModuleList) else 0
    if count:
        # What is left may lie in the mapped file of the checkpoint, and keep all of it in memory.
        for kept in model.parameters():
            kept.data = kept.data.clone()
    return count


def _pack_inside(module: nn.Module) -> int:
    count = 0
    for name, child in list(module.named_children()):
        packed = _replacement(child)
        if packed is None:
            count += _pack_inside(child)
        elif _agree(child, *packed):
            setattr(module, name, packed[0])
            count += 1
        else:
            warnings.warn(
                f"{type(child).__name__} on packed weights does not do what it did; it is used as it is, more slowly",
                stacklevel=3,
            )
    return count


def _agree(module: nn.Module, packed: nn.Module, width: int) -> bool:
    """Whether both give the same for some inputs [n, width], up to rounding."""
    x = torch.randn(_ROWS, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, after = module(x).float(), packed(x).float()
    return before.shape == after.shape and bool((after - before).norm() <= _TOLERANCE * before.norm())


def _replacement(module: nn.Module) -> tuple[nn.Module, int] | None:
    """The packed form of this kind of module, if there is one, and how wide its inputs are."""
    if type(module) is nn.Linear and supports(module.weight):
        return _Linear(module), module.in_features
    parts = [_plain_linear(getattr(module, name, None)) for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = parts
    activation = type(getattr(module, "act_fn", None)).__name__
    if gate is not None and up is not None and down is not None and activation in ("SiLU", "SiLUActivation"):
        return _MLP(gate, up, down), gate.in_features
    if type(module).__name__.endswith("RMSNorm"):
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if weight is not None and isinstance(epsilon, float) and supports(weight[None]):
            return _RMSNorm(weight, epsilon), len(weight)
    return None


def _plain_linear(module: nn.Module | None) -> nn.Linear | None:
    """The module, if it is a linear layer without bias that can be packed."""
    plain = type(module) is nn.Linear and module.bias is None and supports(module.weight)
    return module if plain else None  # type: ignore[return-value]


class _Linear(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._product = PackedLinear(linear.weight, linear.bias)
        self.register_buffer("weight", self._product.memory(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)


class _MLP(nn.Module):
    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self._gate, self._down = PackedGate(gate.weight, up.weight), PackedLinear(down.weight)
        self.register_buffer("gate_up", self._gate.memory(), persistent=False)
        self.register_buffer("down", self._down.memory(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._down(self._gate(x))


class _RMSNorm(nn.Module):
    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self._weight, self._epsilon = weight.detach().clone(), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight, self._epsilon)
