"""Products of bf16 values in float32: against float64, at every kind of remainder, on any number of threads."""

from __future__ import annotations

import pytest
import torch

from onpolicy import bf16_products
from onpolicy.losses._projection import Projection

pytestmark = pytest.mark.skipif(not bf16_products.available(), reason="needs a CPU that multiplies bf16")

SHAPES = [(1, 1, 2), (12, 32, 64), (13, 33, 66), (5, 95, 30), (40, 130, 576)]  # n, V, D


def close(found: torch.Tensor, exact: torch.Tensor, size: torch.Tensor) -> bool:
    """Within float32 rounding of sums whose terms have absolute values that add up to ``size``."""
    return bool(((found.double() - exact).abs() <= 1e-6 * size + 1e-30).all())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("shape", SHAPES)
def test_logits(shape: tuple[int, int, int], dtype: torch.dtype, one_thread_or_two) -> None:
    n, vocab, size = shape
    hidden, head = torch.randn(n, size).bfloat16(), torch.randn(vocab, size).to(dtype)
    assert bf16_products.supports(head)
    out = torch.full((n, vocab), torch.nan)
    bf16_products.logits(hidden, head, out)
    left, right = hidden.double(), head.bfloat16().double()
    assert close(out, left @ right.T, left.abs() @ right.abs().T)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 192, 32), (275, 230, 40)])
def test_the_heads_gradient(shape: tuple[int, int, int], one_thread_or_two) -> None:
    n, vocab, size = shape
    grad, hidden, before = torch.randn(n, vocab).bfloat16(), torch.randn(n, size).bfloat16(), torch.randn(vocab, size)
    total = before.clone()
    bf16_products.add_weight_gradient(total, grad, hidden)
    left, right = grad.double().T, hidden.double()
    assert close(total, before + left @ right, before.abs() + left.abs() @ right.abs())


def test_a_float32_head_is_rounded_as_torch_rounds_it() -> None:
    """To nearest, ties to even; infinite and NaN stay what they are and touch no other row."""
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0x00010000 << 7])
    head = torch.zeros(len(bits), 2)
    head[:, 1] = bits.to(torch.int32).view(torch.float32)
    out = torch.empty(1, len(bits))
    bf16_products.logits(torch.tensor([[0.0, 1.0]]).bfloat16(), head, out)
    assert torch.equal(out[0].nan_to_num(7, 8, 9), head[:, 1].bfloat16().float().nan_to_num(7, 8, 9))


def test_projections_use_them(monkeypatch) -> None:
    """And what they cannot do goes the other way, with the same result."""
    calls = []
    product = bf16_products.logits
    monkeypatch.setattr(bf16_products, "logits", lambda *a: (calls.append(1), product(*a)))
    hidden, head = torch.randn(3, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    results = [
        Projection(hidden, weights, None, 40).logits(hidden, torch.empty(3, 40))
        for weights in (head, head.t().contiguous().t())
    ]
    assert len(calls) == 1 and torch.allclose(*results)


def test_a_trained_head_gets_its_gradient_from_them(monkeypatch) -> None:
    """From the 16-bit copy of the gradient by the logits; without one, or where it cannot be, the other way."""
    calls = []
    product = bf16_products.add_weight_gradient
    monkeypatch.setattr(bf16_products, "add_weight_gradient", lambda *a: (calls.append(1), product(*a)))
    hidden, head = torch.randn(3, 8).bfloat16(), torch.randn(40, 8)
    grad = torch.randn(3, 40).bfloat16()
    totals = [torch.zeros(40, 8) for _ in range(2)]
    for total, rounded in zip(totals, (grad, None), strict=True):
        Projection(hidden, head, None, 40).add_grad_head(total, grad.float(), rounded, hidden)
    assert len(calls) == 1 and torch.allclose(*totals, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("shape", [(1, 2, 2), (12, 192, 32), (13, 194, 66), (5, 96, 30), (25, 500, 620)])
def test_the_hidden_states_gradient(shape: tuple[int, int, int], dtype: torch.dtype, one_thread_or_two) -> None:
    n, vocab, size = shape
    grad, head = torch.randn(n, vocab).bfloat16(), torch.randn(vocab, size).to(dtype)
    left, right = grad.double(), head.bfloat16().double()
    assert close(bf16_products.hidden_gradient(grad, head), left @ right, left.abs() @ right.abs())


def test_an_odd_vocabularys_gradient_goes_the_other_way() -> None:
    hidden, head, grad = torch.randn(3, 8).bfloat16(), torch.randn(41, 8), torch.randn(3, 41).bfloat16()
    found = Projection(hidden, head, None, 41).grad_hidden(grad.float(), grad)
    assert torch.allclose(found.float(), grad.float() @ head, rtol=2e-2, atol=2e-2)
