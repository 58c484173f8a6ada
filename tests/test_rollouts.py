"""Samplers: the draw against brute force, the transformers sampler against full forward passes, and the weight-sync
fault of vLLM, reproduced and caught. What needs longer vLLM runs is in tests/slow/test_vllm.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_models import VOCAB, tiny_llama, weights

from onpolicy.parity import ParityError, ParityMeter
from onpolicy.rollouts.base import check_room, make_rollout
from onpolicy.rollouts.draw import draw_tokens, invert_cdf, uniforms
from onpolicy.rollouts.transformers_sampler import TransformersSampler
from onpolicy.types import Prompt, Rollout, SamplingParams
from spec.sampling import NonFiniteLogits, processed_logprobs


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: a second thread costs more than it brings, much more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return tiny_llama(root / "old", seed=1), tiny_llama(root / "new", seed=2)


def some_prompts(count: int) -> list[Prompt]:
    lengths = [5 + 9 * i for i in range(count)]
    return [
        Prompt(f"p{i}", tuple(np.random.default_rng(i).integers(0, VOCAB, n).tolist())) for i, n in enumerate(lengths)
    ]


def drawn(rollouts: list[Rollout]) -> list[tuple[str, int, list[int], list[float], str]]:
    return [
        (r.prompt.id, r.sample_index, r.completion_ids.tolist(), r.logprobs.tolist(), r.finish_reason) for r in rollouts
    ]


# --- the draw ---------------------------------------------------------------------------------------------------


def test_uniforms_are_fixed_for_good() -> None:
    # Golden values: a change would make a resumed run draw other completions than the uninterrupted one.
    found = uniforms(np.array([0, 1, 2**63 - 1], dtype=np.uint64), np.array([0, 0, 5]))
    assert found.tolist() == [0.6524484863740322, 0.36818951565166946, 0.5854352489135838]


def test_uniforms_are_uniform_and_independent_over_seeds_and_positions() -> None:
    seeds, positions = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200), indexing="ij")
    grid = uniforms(seeds.ravel(), positions.ravel()).reshape(200, 200)
    counts = np.bincount((grid.ravel() * 64).astype(int), minlength=64)
    chi2 = float(((counts - 625) ** 2 / 625).sum())
    assert 30 < chi2 < 110  # 63 degrees of freedom: mean 63, standard deviation 11
    centred = grid - 0.5
    for lagged in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(lagged.mean())) < 4 * (1 / 12) / math.sqrt(lagged.size)
    assert len(np.unique(grid)) == grid.size


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 127, 128, 129, 500]), st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 10**6))
def test_invert_cdf_is_the_smallest_token_whose_cdf_exceeds_the_uniform(size: int, u: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(3, size, generator=generator) ** 8
    probs[:, torch.rand(size, generator=generator) < 0.5] = 0.0
    probs[:, -1] += 1e-3
    tokens = invert_cdf(probs, torch.full((3,), u, dtype=torch.float64))
    cdf = probs.double().cumsum(1) / probs.double().sum(1, keepdim=True)
    for row, token in enumerate(tokens.tolist()):
        assert probs[row, token] > 0
        # Sums of float32 round: the boundary between two tokens may move by some 1e-6.
        assert (cdf[row, token - 1] if token else 0.0) - 2e-6 <= u <= cdf[row, token] + 2e-6


def test_the_draw_has_exactly_the_processed_distribution() -> None:
    # An even grid of uniforms instead of random ones: counts are the probabilities, to one grid step, not just nearly.
    steps = 100_000
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)) * 2
    grid = (np.arange(steps) + 0.5) / steps
    for params in (SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(top_p=0.8, top_k=40)):
        want = processed_logprobs(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p).exp()[
            0
        ]
        tokens = torch.cat([draw_tokens(logits.expand(10_000, -1), part, params)[0] for part in np.split(grid, 10)])
        counts = torch.bincount(tokens, minlength=300)
        assert float((counts / steps - want).abs().max()) <= 2 / steps


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 255, 256, 257, 1000]), st.floats(0.0, 1.0, exclude_max=True), st.integers(0, 10**6),
    st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_an_untruncated_draw_is_the_smallest_token_whose_cdf_exceeds_the_uniform(size, u, seed, temperature, dtype):
    """By the compiled pass: at the edges of its blocks, beside tokens that cannot be drawn, for padded rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(3, size + 8, generator=generator)).to(dtype)[:, :size]
    logits[:, torch.rand(size, generator=generator) < 0.5] = -torch.inf
    logits[:, seed % size] = 0.0
    tokens, logprobs = draw_tokens(logits, np.full(3, u), SamplingParams(temperature=temperature))
    log_law = (logits.double() / temperature).log_softmax(-1)
    cdf = log_law.exp().cumsum(1)
    for row, token in enumerate(tokens.tolist()):
        assert log_law[row, token] > -torch.inf
        assert (cdf[row, token - 1] if token else 0.0) - 2e-6 <= u <= cdf[row, token] + 2e-6
        assert abs(logprobs[row] - log_law[row, token]) <= 1e-5 * (1 + abs(log_law[row, token]))


def test_logprobs_of_the_draw_are_those_of_the_processed_distribution() -> None:
    logits = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    uniform = uniforms(np.arange(64, dtype=np.uint64), np.zeros(64))
    params = SamplingParams(temperature=0.6, top_p=0.9, top_k=30)
    tokens, logprobs = draw_tokens(logits, uniform, params)
    want = processed_logprobs(logits, temperature=0.6, top_p=0.9, top_k=30).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, want, rtol=0, atol=1e-5)  # log of a float32 softmax
    greedy, at_one = draw_tokens(logits, uniform, SamplingParams(temperature=0))
    assert torch.equal(greedy, logits.argmax(-1))
    torch.testing.assert_close(at_one, logits.log_softmax(-1).amax(-1), rtol=0, atol=1e-6)


def test_a_model_that_returns_nan_is_an_error_not_a_token() -> None:
    logits = torch.zeros(2, 10)
    for bad in (float("nan"), -float("nan"), float("inf")):
        logits[1, 3] = bad
        with pytest.raises(NonFiniteLogits):
            draw_tokens(logits, np.zeros(2), SamplingParams())
    logits[1] = -float("inf")
    with pytest.raises(NonFiniteLogits):
        draw_tokens(logits, np.zeros(2), SamplingParams(temperature=0.5))
    with pytest.raises(RuntimeError, match="position 1 of prompt 'a'"):
        make_rollout(Prompt("a", (1,)), 0, [4, 5], [-1.0, float("-inf")], (), 0, "student")


# --- the transformers sampler -------------------------------------------------------------------------------------


def test_completions_follow_their_own_seed_and_not_the_batch(models: tuple[Path, Path]) -> None:
    prompts = some_prompts(4)
    params = SamplingParams(max_tokens=12, n=3, seed=5)
    with TransformersSampler(models[0], dtype="float32") as sampler:
        together = sampler.generate(prompts, params)
        alone = [rollout for prompt in reversed(prompts) for rollout in sampler.generate([prompt], params)]
        reseeded = sampler.generate(prompts, SamplingParams(max_tokens=12, n=3, seed=6))
    assert [(r.prompt.id, r.sample_index) for r in together] == [(p.id, i) for p in prompts for i in range(3)]
    by_name = {(r.prompt.id, r.sample_index): r for r in alone}
    for rollout in together:
        twin = by_name[rollout.prompt.id, rollout.sample_index]
        assert rollout.completion_ids.tolist() == twin.completion_ids.tolist()
        # float32 sums in another order, since other rows pad the batch differently
        np.testing.assert_allclose(rollout.logprobs, twin.logprobs, atol=2e-4)
    ids = {tuple(r.completion_ids.tolist()) for r in together + reseeded}
    assert len(ids) == 24  # n samples and two seeds: no two completions share their random numbers


@pytest.mark.parametrize("params", [SamplingParams(max_tokens=10), SamplingParams(0.7, 0.9, 50, max_tokens=10)])
def test_sampled_logprobs_equal_one_full_forward_pass(models: tuple[Path, Path], params: SamplingParams) -> None:
    sampler = TransformersSampler(models[0], dtype="float32")
    model = sampler._open_model()
    for rollout in sampler.generate(some_prompts(3), params):
        ids = torch.tensor([*rollout.prompt.token_ids, *rollout.completion_ids.tolist()])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        full = processed_logprobs(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
        want = full.gather(1, ids[0, len(rollout.prompt.token_ids) :, None])[:, 0]
        np.testing.assert_allclose(rollout.logprobs, want.numpy(), atol=2e-4)


def test_a_stop_token_ends_its_completion_and_is_kept(models: tuple[Path, Path]) -> None:
    prompts = some_prompts(4)
    progress: list[int] = []
    with TransformersSampler(models[0], dtype="float32", max_num_seqs=3) as sampler:
        free = sampler.generate(prompts, SamplingParams(max_tokens=16))
        assert {r.finish_reason for r in free} == {"length"}
        stop = int(free[0].completion_ids[6])
        stopped = sampler.generate(prompts, SamplingParams(max_tokens=16, stop_token_ids=(stop,)), progress.append)
    for before, after in zip(free, stopped, strict=True):
        hits = np.flatnonzero(before.completion_ids == stop)
        end = int(hits[0]) + 1 if len(hits) else 16
        assert after.completion_ids.tolist() == before.completion_ids[:end].tolist()
        assert after.finish_reason == ("stop" if len(hits) else "length")
        assert len(after.logprobs) == end
    assert sum(progress) == sum(map(len, stopped)) and len(progress) == 2


def test_sync_replaces_the_weights_and_stamps_the_version(models: tuple[Path, Path]) -> None:
    old, new = models
    params = SamplingParams(temperature=0, max_tokens=8)
    with TransformersSampler(old, dtype="float32") as sampler, TransformersSampler(new, dtype="float32") as fresh:
        before = sampler.generate(some_prompts(2), params)
        sampler.sync(weights(new).items(), policy_version=7)
        after = sampler.generate(some_prompts(2), params)
        assert drawn(after) == drawn(fresh.generate(some_prompts(2), params)) != drawn(before)
        assert {r.policy_version for r in before} == {0} and {r.policy_version for r in after} == {7}
        with pytest.raises(ValueError, match=r"missing .*model\.embed_tokens"):
            sampler.sync({"model.norm.weight": torch.ones(128)}.items(), policy_version=8)
        assert sampler.policy_version == 7
    with pytest.raises(ValueError, match="closed"):
        sampler.generate(some_prompts(1), params)


def test_a_prompt_that_does_not_fit_is_refused_by_name() -> None:
    prompt = Prompt("abc", tuple(range(30)))
    check_room([prompt], SamplingParams(max_tokens=10), 40)
    with pytest.raises(ValueError, match=r"'abc' has 30 tokens.*max_model_len=39.*lower max_tokens to at most 9"):
        check_room([prompt], SamplingParams(max_tokens=10), 39)
    with pytest.raises(ValueError, match="'empty' has no tokens"):
        check_room([Prompt("empty", ())], SamplingParams(), 40)


# --- vLLM: the fault that would spoil every run -----------------------------------------------------------------


def parity(rollouts: list[Rollout], path: Path) -> ParityMeter:
    """The sampler's log-probs beside a trainer's, of the sampler's own tokens, as every step compares them."""
    model, meter = TransformersSampler(path, dtype="float32")._open_model(), ParityMeter()
    for rollout in rollouts:
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([*rollout.prompt.token_ids, *rollout.completion_ids.tolist()])[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0, start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]
        meter.add(logprobs, torch.from_numpy(rollout.logprobs))
    return meter


def test_the_tied_head_fault_is_real_the_parity_check_sees_it_and_the_repair_mends_it(
    models: tuple[Path, Path],
) -> None:
    pytest.importorskip("vllm")
    from onpolicy.rollouts.vllm_draw import install
    from onpolicy.rollouts.vllm_local import VLLMSampler
    from onpolicy.rollouts.vllm_weights import own_products, repack_tied_head

    old, new = models
    prompts, params = some_prompts(3), SamplingParams(max_tokens=12, seed=1)
    with VLLMSampler(old, max_model_len=128, kv_cache_gib=0.05, repair_tied_head=False) as sampler:
        first = sampler.generate(prompts, params)
        sampler.sync(weights(new).items(), policy_version=1)
        stale = sampler.generate(prompts, params)
        with own_products():
            repack_tied_head(sampler._runner.get_model())
        mended = sampler.generate(prompts, params)
        sampler._repair_tied_head = True
        sampler.sync(weights(old).items(), policy_version=2)
        back = sampler.generate(prompts, params)
        sampler._draw = install(sampler._runner, used_ids=300)
        sampler._draw.params = params
        restricted = sampler.generate(prompts, params)
    # bf16 against float32 on these sharp random logits: some tenths of a nat at worst; a stale head: nats.
    for rollouts, path in ((first, old), (mended, new)):
        assert parity(rollouts, path).largest < 0.5
        parity(rollouts, path).check(0.2, step=1)  # the default bound
    assert parity(stale, new).largest > 2.0
    with pytest.raises(ParityError, match="does not have the weights"):
        parity(stale, new).check(0.2, step=1)
    assert drawn(back) == drawn(first)  # to the last bit
    assert back[0].policy_version == 2
    assert max(r.completion_ids.max() for r in first) >= 300 > max(r.completion_ids.max() for r in restricted)
