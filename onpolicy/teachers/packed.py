"""A frozen model's layers on weights laid out for this CPU: its scores are half of a step's products.

The modules of a transformers model are replaced one by one: linear layers, the gate of an MLP with its SiLU, RMS
norms. What a module does is taken from its name and parts, so the model is asked before and after, and stays as it was
where the answers differ by more than rounding.
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

_TOLERANCE = 0.05  # of hidden states, relative to their root mean square: some forty roundings to bf16


@torch.no_grad()
def pack_layers(model: PreTrainedModel) -> bool:
    """Replace what can be replaced in the decoder's layers, in place; False where nothing was.

    For a model that is neither trained, nor saved, nor copied any more: the original weights are given up.
    """
    layers = getattr(base_model(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return False
    replaced = {name: new for name, module in layers.named_modules() if (new := _replacement(module)) is not None}
    inside = tuple(f"{name}." for name in replaced)
    replaced = {name: new for name, new in replaced.items() if not name.startswith(inside)}
    if not replaced:
        return False
    originals = {name: layers.get_submodule(name) for name in replaced}
    before = _answer(model)
    _put(layers, replaced)
    difference = (_answer(model) - before).pow(2).mean().sqrt() / before.pow(2).mean().sqrt()
    if difference <= _TOLERANCE:
        return True
    _put(layers, originals)
    warnings.warn(
        f"{type(model).__name__} on packed weights differs from itself by {difference:.2g}, relative to its hidden "
        "states; it is used as it is, more slowly",
        stacklevel=2,
    )
    return False


def _put(layers: nn.ModuleList, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        layers.set_submodule(name, module)


def _answer(model: PreTrainedModel) -> Tensor:
    """Hidden states of some tokens, float32."""
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (2, 24), generator=generator)
    return base_model(model).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.float()


def _replacement(module: nn.Module) -> nn.Module | None:
    """The packed form of this kind of module, if there is one."""
    if type(module) is nn.Linear and supports(module.weight):
        return _Linear(module)
    parts = [_plain_linear(getattr(module, name, None)) for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = parts
    activation = type(getattr(module, "act_fn", None)).__name__
    if gate is not None and up is not None and down is not None and activation in ("SiLU", "SiLUActivation"):
        return _MLP(gate, up, down)
    if type(module).__name__.endswith("RMSNorm"):
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
        if weight is not None and isinstance(epsilon, float) and supports(weight[None]):
            return _RMSNorm(weight, epsilon)
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
        self._weight, self._epsilon = weight.detach().float(), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._weight, self._epsilon)
