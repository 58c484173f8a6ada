"""A student's layers by our kernels: values and gradients against float64, and a model that is as good as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from onpolicy.attention import Layout
from onpolicy.batching import pack, text_rollout
from onpolicy.bf16_products import available
from onpolicy.layers.replace import quicken_layers
from onpolicy.layers.rotary import lay_out
from onpolicy.layers.trained import gated, project, rms_norm
from onpolicy.models import hidden_states, load_causal_lm
from onpolicy.types import Prompt

pytestmark = [
    pytest.mark.skipif(not available(), reason="needs a CPU that multiplies bf16"),
    pytest.mark.usefixtures("one_thread_or_two"),
]


def agree(found: Tensor, wanted: Tensor, tolerance: float = 2**-8) -> bool:
    """bf16 rounds by up to 2^-9 of each value."""
    return bool((found.double() - wanted).norm() <= tolerance * wanted.norm())


def both_ways(ours, exact, inputs: list[Tensor], grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of a function by our kernels and in float64."""
    narrow = [x.requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = ours(*narrow), exact(*wide)
    gradients = torch.autograd.grad(found, narrow, grad), torch.autograd.grad(wanted, wide, grad.double())
    return [(found, wanted), *zip(*gradients, strict=True)]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 2, (2,)), (13, 34, (3, 5)), (250, 66, (100, 40, 40)), (515, 40, (62, 2))]
)
def test_products(rows: int, inputs: int, outputs: tuple[int, ...]) -> None:
    x, grad = torch.randn(rows, inputs).bfloat16(), torch.randn(rows, sum(outputs)).bfloat16()
    weights = [torch.randn(count, inputs).bfloat16().float() for count in outputs]
    pairs = both_ways(project, lambda x, *w: x @ torch.cat(w).T, [x, *weights], grad)
    assert all(agree(*pair) for pair in pairs)
    assert all(agree(*pair, 1e-5) for pair in pairs[2:])  # of weights: float32, never rounded


def test_frozen_weights_get_no_gradient() -> None:
    x, weight = torch.randn(3, 8).bfloat16().requires_grad_(), torch.randn(4, 8)
    project(x, weight).float().sum().backward()
    assert weight.grad is None and agree(x.grad, weight.bfloat16().double().sum(0).expand(3, 8))


@pytest.mark.parametrize("width", (2, 48, 575))
def test_norms(width: int) -> None:
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    x, weight, grad = 3 * torch.randn(2, 4, width), torch.randn(width), torch.randn(2, 4, width).bfloat16()
    value, *gradients = both_ways(lambda x, w: rms_norm(x, w, 1e-5), exact, [x, weight], grad)
    assert agree(*value) and all(agree(*pair, 1e-5) for pair in gradients)


def test_gates() -> None:
    x, grad = 10 * torch.randn(3, 5, 66).bfloat16(), torch.randn(3, 5, 33).bfloat16()
    exact = lambda x: nn.functional.silu(x[..., :33]) * x[..., 33:]  # noqa: E731
    assert all(agree(*pair) for pair in both_ways(gated, exact, [x], grad))


def some_batch(share_prompts: bool = True):
    prompts = [Prompt("a", tuple(range(20))), Prompt("b", (5, 6, 7))]
    texts = [(prompts[0], range(30)), (prompts[0], range(40, 45)), (prompts[1], range(9)), (prompts[0], [3])]
    return pack([text_rollout(p, list(ids)) for p, ids in texts], 1000, share_prompts=share_prompts)[0]


@pytest.mark.parametrize("size", (2, 40))
def test_turned_and_laid_out(size: int) -> None:
    layout = some_batch().layout
    rows, length, heads = 2, len(layout.scatter) // 2, 3
    states = torch.randn(rows, length, (heads + 2) * size).bfloat16()
    angles = torch.randn(rows, length, size)
    cos, sin = angles.cos(), angles.sin()
    grad = torch.randn(layout.gather.numel(), (heads + 2) * size).bfloat16()
    inside = (torch.arange(layout.gather.shape[1]) < layout.spans[:, 1:]).flatten()
    grad[~inside] = 0  # no query sees padding

    def exact(states: Tensor) -> Tensor:
        split = states.view(rows, length, heads + 2, size)
        halves = torch.cat([-split[..., size // 2 :], split[..., : size // 2]], -1)
        turned = split * cos[:, :, None].double() + halves * sin[:, :, None].double()
        turned[:, :, -1] = split[:, :, -1]  # values stay
        return turned.reshape(rows * length, -1)[layout.gather.flatten()]

    def ours(states: Tensor) -> Tensor:
        return torch.cat([x.flatten(0, 1).flatten(1) for x in lay_out(states, cos, sin, layout, heads)], -1)

    assert all(agree(*pair) for pair in both_ways(ours, exact, [states], grad))


def gradients(model, batch) -> dict[str, Tensor]:
    """Of a sum that every weight has a part in."""
    model.zero_grad()
    states = hidden_states(model, batch).float()
    (states @ torch.linspace(-1, 1, states.shape[1])).pow(2).sum().backward()
    return {name: p.grad.clone().double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def model(teacher_dir):
    """One whose norms are not all ones."""
    model = load_causal_lm(str(teacher_dir), torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
            if p.ndim == 1:
                p.add_(0.5 * torch.randn(p.shape, generator=generator)).copy_(p.bfloat16())
    return model


@pytest.mark.parametrize("share_prompts", (True, False))
def test_a_model_learns_what_it_learnt_before(model, share_prompts: bool) -> None:
    batch, quick = some_batch(share_prompts), copy.deepcopy(model)
    layers = len(quick.get_decoder().layers)
    names = list(quick.state_dict())
    assert quicken_layers(quick) == 4 * layers + 1 and list(quick.state_dict()) == names
    exact = gradients(model, batch)
    plain = gradients(quick, batch)  # outside of autocast nothing changes
    assert all(torch.equal(exact[name], plain[name]) for name in exact)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = gradients(model, batch), gradients(quick, batch)
        copied = gradients(copy.deepcopy(quick), batch)
    assert before.keys() == after.keys()
    error = lambda found: sum((found[name] - exact[name]).norm() ** 2 for name in exact) ** 0.5  # noqa: E731
    assert 0 < error(after) <= 1.2 * error(before)
    assert all(torch.equal(copied[name], after[name]) for name in after)


def test_a_module_that_does_something_else_stays_as_it_is(model) -> None:
    odd = copy.deepcopy(model)
    layer = odd.get_decoder().layers[0]
    original = layer.post_attention_layernorm.forward
    layer.post_attention_layernorm.forward = lambda x: 1.5 * original(x)
    with pytest.warns(UserWarning, match="LlamaRMSNorm by our kernels does not do what it did"):
        assert quicken_layers(odd) == 4 * len(odd.get_decoder().layers)


def test_a_plain_layout_and_its_sources() -> None:
    layout = Layout.plain(2, 3)
    places, begins = layout.sources
    assert places.tolist() == list(range(6)) and begins.tolist() == list(range(7))
    layout = some_batch().layout
    places, begins = layout.sources
    for position in range(len(layout.scatter)):
        mine = places[begins[position] : begins[position + 1]]
        assert (layout.gather.flatten()[mine] == position).all()
    assert int(begins[-1]) == int(layout.spans[:, 1].sum())
    assert layout.spans[:, 0].tolist().count(0) == 2  # of each prompt's first completion all is needed
