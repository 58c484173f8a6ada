"""Packing must change nothing: every completion is computed as if it stood alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy import attention
from onpolicy.batching import pack, text_rollout
from onpolicy.layers.causal_attention import causal_attention
from onpolicy.models import hidden_states, load_causal_lm
from onpolicy.types import Prompt, Rollout


def rollout(prompt: Prompt, ids: list[int], sample: int = 0) -> Rollout:
    logprobs = -np.arange(1, len(ids) + 1, dtype=np.float32) - sample
    return Rollout(prompt, np.array(ids), logprobs, "length", 0, sample)


@st.composite
def rollout_lists(draw) -> list[Rollout]:
    token = st.integers(0, 383)
    result = []
    for p in range(draw(st.integers(1, 4))):
        prompt = Prompt(str(p), (*draw(st.lists(token, min_size=1, max_size=9)), p))
        for n in range(draw(st.integers(1, 3))):
            result.append(rollout(prompt, draw(st.lists(token, min_size=1, max_size=7)), n))
    return draw(st.permutations(result))


@pytest.fixture(scope="module")
def model(teacher_dir):
    return load_causal_lm(str(teacher_dir), torch.float32)


def alone(model, r: Rollout) -> torch.Tensor:
    """Hidden states that predict the completion, from the plain causal forward of prompt + completion."""
    ids = torch.tensor([[*r.prompt.token_ids, *r.completion_ids.tolist()]])
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden[len(r.prompt.token_ids) - 1 : -1]


def as_trained(precision: torch.dtype) -> torch.autocast:
    """The context of a student's forward pass (student.precision)."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.08)])
@settings(max_examples=20, deadline=None)
@given(rollouts=rollout_lists(), budget=st.integers(1, 120), share=st.booleans())
def test_hidden_states_equal_those_of_each_completion_alone(
    model, precision, tolerance, rollouts, budget, share
) -> None:
    """In bf16 too, where another attention computes them: the exact states, but for rounding."""
    seen = []
    for batch in pack(rollouts, budget, share_prompts=share):
        with torch.no_grad(), as_trained(precision):
            hidden = hidden_states(model, batch).float()
        for k, index in enumerate(batch.indices):
            mine = batch.sequence_ids == k
            exact = alone(model, rollouts[index])
            torch.testing.assert_close(hidden[mine], exact, rtol=tolerance, atol=tolerance)
            assert batch.token_ids[mine].tolist() == rollouts[index].completion_ids.tolist()
            np.testing.assert_array_equal(batch.sampler_logprobs[mine], rollouts[index].logprobs)
        seen += batch.indices
    assert sorted(seen) == list(range(len(rollouts)))


@given(rollouts=rollout_lists(), budget=st.integers(1, 120))
def test_budget_holds_wherever_a_row_fits_it(rollouts, budget) -> None:
    for batch in pack(rollouts, budget):
        assert batch.num_inputs <= budget or len(batch.input_ids) == 1


def test_a_shared_prompt_is_computed_once() -> None:
    prompt = Prompt("p", tuple(range(50)))
    samples = [rollout(prompt, [1, 2, 3, 4], n) for n in range(4)]
    (shared,) = pack(samples, 1000)
    (separate,) = pack(samples, 1000, share_prompts=False)
    assert shared.num_inputs == 50 + 4 * 3
    assert separate.num_inputs == 4 * 53


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_gradient_through_a_shared_prompt_is_the_sum_over_its_samples(model, precision, tolerance, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(attention, "causal_attention", lambda *args: calls.append(1) or causal_attention(*args))
    prompt = Prompt("p", (5, 6, 7))
    samples = [rollout(prompt, ids, n) for n, ids in enumerate([[1, 2, 3], [9, 8], [4]])]
    weight = model.get_decoder().layers[0].mlp.up_proj.weight

    def gradient(share: bool, precision: torch.dtype) -> torch.Tensor:
        with as_trained(precision):
            states = [hidden_states(model, batch) for batch in pack(samples, 1000, share_prompts=share)]
        # The sum of squares of normed states would have hardly any gradient.
        direction = torch.linspace(-1, 1, states[0].shape[1])
        return torch.autograd.grad(sum((s.float() @ direction).pow(2).sum() for s in states), weight)[0]

    exact = gradient(False, torch.float32)
    assert (gradient(True, precision) - exact).norm() < tolerance * exact.norm()
    assert len(calls) == (4 if precision == torch.bfloat16 else 0)  # of four layers: what training in bf16 uses


def test_dataset_text_has_no_sampler_logprobs() -> None:
    assert np.isnan(text_rollout(Prompt("p", (1,)), [4, 5]).logprobs).all()


def test_budget_must_be_positive() -> None:
    with pytest.raises(ValueError, match="token_budget must be at least 1"):
        pack([], 0)


def test_a_model_that_drops_the_layout_is_refused(model, monkeypatch) -> None:
    from onpolicy import models

    models.check_shared_prompts(model)
    plain = type(model.get_decoder()).forward
    monkeypatch.setattr(
        type(model.get_decoder()), "forward", lambda self, shared_prompts=None, **inputs: plain(self, **inputs)
    )
    with pytest.raises(ValueError, match="batching.share_prompts: false"):
        models.check_shared_prompts(model)
