"""Linear layers on packed weights, and a teacher made of them: against float64, at every kind of remainder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onpolicy.attention import Layout, register
from onpolicy.bf16_products import available
from onpolicy.doctor.costs import tensor_bytes
from onpolicy.layers.packed import PackedGate, PackedLinear, rms_norm, silu_mul
from onpolicy.layers.replace import pack_layers

pytestmark = [
    pytest.mark.skipif(not available(), reason="needs a CPU that multiplies bf16"),
    pytest.mark.usefixtures("one_thread_or_two"),
]

SHAPES = [(1, 1, 2), (8, 48, 32), (9, 49, 34), (250, 100, 66), (3, 24, 576)]  # n, N, I


@pytest.mark.parametrize("shape", SHAPES)
def test_products(shape: tuple[int, int, int]) -> None:
    n, outputs, inputs = shape
    x, weight = torch.randn(n, inputs).bfloat16(), torch.randn(outputs, inputs).bfloat16()
    wide = PackedLinear(weight, dtype=torch.float32)(x)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert bool(((wide.double() - exact).abs() <= 1e-6 * size).all())
    assert torch.equal(PackedLinear(weight)(x), wide.bfloat16())
    bias = torch.randn(outputs).bfloat16()
    assert torch.equal(PackedLinear(weight, bias)(x.view(1, n, inputs))[0], wide.bfloat16() + bias)


@pytest.mark.parametrize("shape", SHAPES)
def test_gates(shape: tuple[int, int, int]) -> None:
    n, outputs, inputs = shape
    x, gate, up = (torch.randn(rows, inputs).bfloat16() for rows in (n, outputs, outputs))
    x[0] *= 100  # far out on both sides of the sigmoid
    exact = nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    size = (x.double().abs() @ gate.double().abs().T) * (x.double().abs() @ up.double().abs().T)
    found = PackedGate(gate, up)(x)
    assert bool(((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * size + 1e-30).all())


@pytest.mark.parametrize("width", (1, 16, 575))
def test_norms(width: int) -> None:
    x, stream, weight = (
        torch.randn(5, width).bfloat16(),
        torch.randn(5, width).bfloat16(),
        torch.randn(width).bfloat16(),
    )

    def exact(states: torch.Tensor) -> torch.Tensor:
        return states / (states.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    assert torch.allclose(rms_norm(x, weight, 1e-5).double(), exact(x.double()), rtol=2**-8, atol=0)
    total = x.double() + stream.double()
    found = rms_norm(x, weight, 1e-5, stream)
    assert torch.allclose(found.double(), exact(total), rtol=2**-8, atol=1e-6)
    assert torch.equal(stream, total.bfloat16())


def test_gates_alone() -> None:
    x = 10 * torch.randn(3, 2, 66).bfloat16()
    exact = nn.functional.silu(x[..., :33].double()) * x[..., 33:].double()
    assert torch.allclose(silu_mul(x).double(), exact, rtol=2**-8, atol=1e-30)


def tiny_llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, **sizes, **options)
    config._attn_implementation = register()
    return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def answer(model, layout: Layout | None = None) -> torch.Tensor:
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    options = {} if layout is None else {"shared_prompts": layout}
    return model.model(input_ids=ids, use_cache=False, **options).last_hidden_state.double()


@pytest.mark.parametrize("biased", (True, False))
def test_a_packed_model_is_as_close_to_the_exact_one_as_it_was(biased: bool) -> None:
    """With a layout of shared prompts and without one."""
    model, exact = tiny_llama(attention_bias=biased), tiny_llama(attention_bias=biased).double()
    layout = Layout.plain(2, 24)
    wanted, before = answer(exact), answer(model)
    size = tensor_bytes(model)
    assert pack_layers(model) == 2 * (1 + 1 + 2)
    kinds = {type(module).__name__ for module in model.model.layers.modules()}
    assert {"_Attention", "_MLP", "_RMSNorm"} <= kinds and "Linear" not in kinds
    assert tensor_bytes(model) >= size  # what it takes is still counted
    for found in (answer(model), answer(model, layout)):
        assert (found - wanted).norm() <= 1.1 * (before - wanted).norm()


def test_packed_attention_goes_on_from_a_cache() -> None:
    model, ids = tiny_llama(), torch.arange(40)[None]
    pack_layers(model)
    whole = model.model(input_ids=ids, use_cache=False).last_hidden_state.float()
    first = model.model(input_ids=ids[:, :30], use_cache=True)
    rest = model.model(input_ids=ids[:, 30:], past_key_values=first.past_key_values).last_hidden_state.float()
    assert (rest - whole[:, 30:]).norm() <= 0.02 * rest.norm()


@pytest.mark.parametrize("options", ({"attention_dropout": 0.1}, {"sliding_window": 8}))
def test_attention_that_is_not_plain_keeps_its_own_way(options) -> None:
    model = tiny_llama(**options)
    assert pack_layers(model) == 2 * (4 + 1 + 2)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_attention_that_turns_nothing_keeps_its_own_way(monkeypatch) -> None:
    """Its parts are those of rotary attention, and its layers are still packed."""
    from transformers.models.llama import modeling_llama

    model = tiny_llama()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    with pytest.warns(UserWarning, match="LlamaAttention by our kernels does not do what it did"):
        assert pack_layers(model) == 2 * (4 + 1 + 2)


def test_a_module_that_packing_changes_stays_as_it_is() -> None:
    """Its MLP looks like all others and multiplies what it returns."""
    model = tiny_llama()
    for layer in model.model.layers:
        original = layer.mlp.forward
        layer.mlp.forward = lambda x, original=original: 3 * original(x)
    before = answer(model)
    with pytest.warns(UserWarning, match="does not do what it did"):
        assert pack_layers(model) == 2 * (1 + 3 + 2)  # the layers in it are
    after = answer(model)
    assert (after - before).norm() <= 0.02 * before.norm()


def test_float32_models_are_left_alone() -> None:
    model = tiny_llama().float()
    assert not pack_layers(model) and "_Linear" not in repr(model)
