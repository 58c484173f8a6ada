"""Causal attention of training against torch's, in float64, in value and gradient."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from onpolicy.layers import causal_attention as module
from onpolicy.layers.causal_attention import causal_attention, fits

OWN = pytest.mark.skipif(not module.available(), reason="needs a CPU that multiplies bf16")


def problem(sequences: int, positions: int, shared: int, group: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(positions)
    heads = (shared * group, shared, shared, shared * group)  # of query, key, value, and the gradient by the output
    return [torch.randn(sequences, positions, h, size, generator=generator).bfloat16() for h in heads]


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("own", (pytest.param(True, marks=OWN), False))
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3), st.sampled_from([6, 8, 16, 40, 64]),
    st.sampled_from([1 << 8, 1 << 12, 1 << 19]),
)  # fmt: skip
def test_values_and_gradients(own, sequences, positions, shared, group, size, at_a_time) -> None:
    """By the own kernel (every kind of remainder of its 12 x 32 blocks) and by batched products."""
    *inputs, grad = problem(sequences, positions, shared, group, size)
    wide = [x.double().requires_grad_() for x in inputs]
    expected = reference(*wide, 0.2)
    gradients = torch.autograd.grad(expected, wide, grad.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SCORES", at_a_time)
        patch.setattr(module, "available", lambda: own)
        narrow = [x.requires_grad_() for x in inputs]
        output = causal_attention(*narrow, 0.2)
        ours = torch.autograd.grad(output, narrow, grad)
    # Probabilities, their gradient and the results are rounded to 8 bits once each. Gradients by query and key are
    # differences (0 for a single position): their error is of the size of what was subtracted.
    floor = 2e-3 * grad.double().norm() * size**0.5
    for got, want in zip((output, *ours), (expected, *gradients), strict=True):
        assert (got.double() - want).norm() <= 1e-2 * want.norm() + floor


@OWN
def test_the_own_kernel_takes_no_notice_of_what_lies_around() -> None:
    """Its blocks reach beyond the last position: what stands there, and how many threads work, change no bit."""
    query, key, value, _ = problem(3, 45, 2, 2, 40)
    once = causal_attention(query, key, value, 0.2)
    padded = [torch.full((x.numel() + 8192,), torch.nan, dtype=x.dtype) for x in (query, key, value)]
    inside = [whole[: x.numel()].view_as(x).copy_(x) for whole, x in zip(padded, (query, key, value), strict=True)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(once, causal_attention(*inside, 0.2))
    finally:
        torch.set_num_threads(threads)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value)]
    assert torch.equal(once, causal_attention(*views, 0.2))


@OWN
@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(1, 70), st.integers(1, 3), st.sampled_from([6, 16, 64]))
def test_spans_change_nothing_within_them(data, sequences, positions, group, size) -> None:
    """Results in the spans, and gradients of anything in them, are to the bit what they are without."""
    *inputs, grad = problem(sequences, positions, 2, group, size)
    ends = [data.draw(st.integers(1, positions)) for _ in range(sequences)]
    spans = torch.tensor([[data.draw(st.integers(0, end)), end] for end in ends])
    order = torch.arange(positions)
    inside = ((order >= spans[:, :1]) & (order < spans[:, 1:]))[..., None, None]
    states = [x.requires_grad_() for x in inputs]
    whole, part = causal_attention(*states, 0.2), causal_attention(*states, 0.2, spans)
    assert torch.equal(whole.where(inside, 0), part.where(inside, 0))
    grad = grad.where(inside, 0)
    for a, b in zip(torch.autograd.grad(whole, states, grad), torch.autograd.grad(part, states, grad), strict=True):
        assert torch.equal(a, b)


def test_no_position_sees_a_later_one() -> None:
    query, key, value, _ = problem(2, 12, 1, 3, 16)
    before = causal_attention(query, key, value, 0.25)
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, 7:] = 3.0
    after = causal_attention(*changed, 0.25)
    assert torch.equal(before[:, :7], after[:, :7]) and not torch.equal(before[:, 7:], after[:, 7:])


def test_it_is_used_where_it_is_right() -> None:
    states = torch.zeros(1, 4, 2, 8)
    assert fits(states.bfloat16()) and not fits(states)
    long = torch.zeros(1, 4096, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    assert not fits(long) and fits(long.detach()) == module.available()


def test_numbas_threads_leave_torchs_loops_flat() -> None:
    """Nested parallel regions, which numba switches on, make small products in torch's loops a hundred times slower."""
    code = (
        "import ctypes, torch; torch.zeros(64, 64) @ torch.zeros(64, 64); "
        "import onpolicy.layers.attention_kernels as k; import numpy as np; "
        "k.softmax(np.ones((1, 2, 2), np.float32), np.float32(1), np.zeros((1, 2, 2), np.int16), "
        "np.zeros((1, 2), np.float32)); print(ctypes.CDLL('libgomp.so.1').omp_get_max_active_levels())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"
