"""Linear layers on packed weights, and a teacher made of them: against float64, at every kind of remainder."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from onpolicy.doctor.costs import tensor_bytes
from onpolicy.losses._bf16_products import available
from onpolicy.packed_linear import PackedGate, PackedLinear, rms_norm, silu_mul
from onpolicy.teachers import packed

pytestmark = pytest.mark.skipif(not available(), reason="needs a CPU that multiplies bf16")

SHAPES = [(1, 1, 2), (8, 48, 32), (9, 49, 34), (250, 100, 66), (3, 24, 576)]  # n, N, I


@pytest.fixture(params=(1, 2), autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


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
    return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def answer(model) -> torch.Tensor:
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
    return model.model(input_ids=ids, use_cache=False).last_hidden_state.double()


def test_a_packed_model_is_as_close_to_the_exact_one_as_it_was() -> None:
    model, exact = tiny_llama(attention_bias=True), tiny_llama(attention_bias=True).double()
    wanted, before = answer(exact), answer(model)
    size = tensor_bytes(model)
    assert packed.pack_layers(model) == 2 * (4 + 1 + 2)
    kinds = {type(module).__name__ for module in model.model.layers.modules()}
    assert {"_Linear", "_MLP", "_RMSNorm"} <= kinds and "Linear" not in kinds
    assert tensor_bytes(model) >= size  # what it takes is still counted
    assert (answer(model) - wanted).norm() <= 1.1 * (before - wanted).norm()


def test_a_module_that_packing_changes_stays_as_it_is() -> None:
    """Its MLP looks like all others and multiplies what it returns."""
    model = tiny_llama()
    for layer in model.model.layers:
        original = layer.mlp.forward
        layer.mlp.forward = lambda x, original=original: 3 * original(x)
    before = answer(model)
    with pytest.warns(UserWarning, match="does not do what it did"):
        assert packed.pack_layers(model) == 2 * (4 + 2)
    after = answer(model)
    assert (after - before).norm() <= 0.02 * before.norm()


def test_float32_models_are_left_alone() -> None:
    model = tiny_llama().float()
    assert not packed.pack_layers(model) and "_Linear" not in repr(model)
