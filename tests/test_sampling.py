"""Processed probabilities against transformers' processors, vLLM's sampler operations and hand-computed cases."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spec.params import GREEDY_BELOW
from spec.rows import score
from spec.sampling import NonFiniteLogits, Params, processed_logprobs, processed_probs, row_options
from spec.sampling_kernels import Backend, kept_floor

INF = math.inf
GRID = list(itertools.product((0.3, 1.0, 1.7), (0, 1, 5, 40, 1000), (1.0, 0.9, 0.3, 1e-6)))


def random_logits(rows: int = 4, vocabulary: int = 97, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def same_law(mine: torch.Tensor, other: torch.Tensor) -> None:
    """Equal supports, and log-probabilities to float32 rounding."""
    assert torch.equal(mine.isneginf(), other.isneginf())
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ("numba", "torch"))
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), GRID)
def test_filters_agree_with_transformers(temperature: float, top_k: int, top_p: float, backend: Backend) -> None:
    logits = random_logits()
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs = processors(None, logits.clone()).log_softmax(-1)
    mine = processed_logprobs(logits, temperature=temperature, top_k=top_k, top_p=top_p, backend=backend)
    same_law(mine, theirs)


@pytest.mark.parametrize("top_k", (0, 20))
def test_min_p_agrees_with_transformers_unless_top_p_is_on(top_k: int) -> None:
    logits = random_logits(seed=1)
    processors = LogitsProcessorList([TemperatureLogitsWarper(1.3)])
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    theirs = LogitsProcessorList([*processors, MinPLogitsWarper(0.05)])(None, logits.clone()).log_softmax(-1)
    same_law(processed_logprobs(logits, temperature=1.3, top_k=top_k, min_p=0.05), theirs)


def test_min_p_comes_before_top_p_as_in_vllm() -> None:
    """Of p = (.5, .25, .15, .1) min-p .4 keeps two, (.67, .33) renormalised, whose top-p .6 nucleus is the first
    alone; the other order takes the nucleus of p, which is two, and min-p then keeps both."""
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    assert processed_probs(logits, min_p=0.4, top_p=0.6).tolist()[0] == pytest.approx([1, 0, 0, 0])
    theirs = LogitsProcessorList([TopPLogitsWarper(0.6), MinPLogitsWarper(0.4)])(None, logits.clone()).softmax(-1)
    assert theirs.tolist()[0] == pytest.approx([2 / 3, 1 / 3, 0, 0])


def test_bias_and_repetition_penalty_agree_with_transformers() -> None:
    logits, history = random_logits(3), torch.tensor([[1, 5, 5], [7, 2, 0], [3, 3, 3]])
    bias = {4: 2.5, 5: -3.0, 9: -INF}
    theirs = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
            RepetitionPenaltyLogitsProcessor(1.4),
            PrefixConstrainedLogitsProcessor(lambda _, __: list(range(50)), 1),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
        ]
    )(history, logits.clone()).log_softmax(-1)
    mine = processed_logprobs(
        logits, logit_bias=bias, repetition_penalty=1.4, prompt_ids=history[:, :1], output_ids=history[:, 1:],
        allowed=torch.arange(97) < 50, temperature=0.7, top_k=20,
    )  # fmt: skip
    same_law(mine, theirs)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.8, 5, 0.9), (1.0, 40, 0.5), (1.0, 97, 0.9), (2.0, 3, 1.0)]
)
def test_filters_agree_with_vllms_sampler(temperature: float, top_k: int, top_p: float) -> None:
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    logits = random_logits(seed=2)
    rows = len(logits)
    k, p = torch.full((rows,), top_k), torch.full((rows,), top_p)
    theirs = ops.apply_top_k_top_p_pytorch(logits / temperature, k, p, allow_cpu_sync=True).log_softmax(-1)
    same_law(processed_logprobs(logits, temperature=temperature, top_k=top_k, top_p=top_p), theirs)
    theirs = ops.apply_top_k_top_p_pytorch(logits / temperature, k, None, allow_cpu_sync=True).log_softmax(-1)
    same_law(processed_logprobs(logits, temperature=temperature, top_k=top_k), theirs)


def test_a_mixed_batch_agrees_with_vllms_whole_sampler() -> None:
    """Penalties, bias, mask, min-p, top-k and top-p at once, a greedy row among them."""
    sampler = pytest.importorskip("vllm.v1.sample.sampler").Sampler
    penalties = pytest.importorskip("vllm.v1.sample.ops.penalties")
    topk = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")
    builtin = pytest.importorskip("vllm.v1.sample.logits_processor.builtin")
    params = [
        Params(temperature=0.7, top_k=10, repetition_penalty=1.3, logit_bias={3: 2.0, 8: -1.0}),
        Params(temperature=1.2, top_p=0.8, min_p=0.02, presence_penalty=0.6, frequency_penalty=0.4),
        Params(temperature=0.9, top_k=30, top_p=0.9, allowed_token_ids=tuple(range(0, 97, 2))),
        Params(temperature=0.0, frequency_penalty=1.0),
    ]
    prompts, outputs = [[1, 2, 3], [4], [5, 5], [6]], [[3, 9, 9], [50, 50, 51], [], [7, 7, 7, 7]]
    logits = random_logits(seed=3)
    options = row_options(params, 97, prompts, outputs)
    mine = processed_logprobs(logits, **options)

    def column(name: str) -> torch.Tensor:
        return torch.tensor([float(getattr(row, name)) for row in params])

    theirs = logits.masked_fill(~options["allowed"], -INF)  # the order of Sampler's docstring
    theirs = theirs + options["logit_bias"]
    padded = torch.tensor([[*ids, *[97] * (3 - len(ids))] for ids in prompts])
    theirs = penalties.apply_all_penalties(
        theirs, padded, column("presence_penalty"), column("frequency_penalty"), column("repetition_penalty"), outputs
    )
    best = theirs.argmax(-1)
    theirs = sampler.apply_temperature(theirs, column("temperature"), all_random=False)
    min_p = builtin.MinPLogitsProcessor.__new__(builtin.MinPLogitsProcessor)
    min_p.min_p_count, min_p.min_p = 1, column("min_p")[:, None]
    theirs = min_p.apply(theirs)
    k = torch.tensor([row.top_k or 97 for row in params])
    theirs = topk.apply_top_k_top_p_pytorch(theirs, k, column("top_p"), allow_cpu_sync=True).log_softmax(-1)
    same_law(mine[:3], theirs[:3])
    assert mine[3].argmax() == best[3] and mine[3].exp().sum() == 1


def test_penalties_by_hand() -> None:
    """Output (1, 1, 2), prompt (0): repetition divides positive and multiplies negative logits of all three."""
    logits = torch.tensor([[2.0, -1.0, 4.0, 1.0]])
    prompt, output = torch.tensor([[0, -1]]), torch.tensor([[1, 1, 2]])
    law = processed_logprobs(
        logits,
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        prompt_ids=prompt,
        output_ids=output,
    )
    expected = torch.tensor([[1.0, -2.0 - 1.0 - 0.25, 2.0 - 0.5 - 0.25, 1.0]]).log_softmax(-1)
    torch.testing.assert_close(law, expected)


def test_boundaries_by_hand() -> None:
    """A token is kept iff the mass of strictly more probable ones is below top_p; a tie is kept whole."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    for backend in ("numba", "torch"):
        for top_p, kept in ((0.5, 1), (0.51, 2), (0.75, 2), (0.76, 4), (1.0, 4), (1e-9, 1)):
            law = processed_probs(logits, top_p=top_p, backend=backend)
            assert int((law > 0).sum()) == kept, (backend, top_p)
        assert int((processed_probs(logits, top_k=3, backend=backend) > 0).sum()) == 4  # the third and fourth tie
        for min_p, kept in ((0.249, 4), (0.251, 2), (1.0, 1)):  # relative to the largest, .5
            assert int((processed_probs(logits, min_p=min_p, backend=backend) > 0).sum()) == kept


def test_greedy_is_one_hot_at_the_lowest_best_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 9.0]])
    assert processed_probs(logits, temperature=0).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert processed_logprobs(logits, temperature=0).tolist() == [[-INF, 0, -INF], [-INF, -INF, 0]]
    mixed = processed_probs(logits, temperature=torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(mixed, torch.stack([logits[0].softmax(-1), torch.tensor([0.0, 0.0, 1.0])]))
    assert processed_probs(logits, temperature=0, logit_bias={2: 1.0}).argmax(-1).tolist() == [2, 2]


def test_rows_do_not_depend_on_their_batch() -> None:
    params = [Params(temperature=t, top_k=k, top_p=p) for t, k, p in GRID]
    logits = random_logits(len(params), 4096, seed=4)
    together = processed_probs(logits, **row_options(params, 4096))
    for i, row in enumerate(params):
        alone = processed_probs(logits[i : i + 1], **row_options([row], 4096))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=0)
        assert torch.equal(together[i : i + 1] > 0, alone > 0)


def test_leading_shapes_and_dtypes() -> None:
    logits = random_logits(6).reshape(2, 3, 97)
    heat, top_k = torch.tensor([[0.5], [2.0]]), torch.tensor([3, 5, 9])
    law = processed_logprobs(logits, temperature=heat, top_k=top_k)
    for i, j in itertools.product(range(2), range(3)):
        alone = processed_logprobs(logits[i, j][None], temperature=float(heat[i, 0]), top_k=int(top_k[j]))[0]
        torch.testing.assert_close(law[i, j], alone)
        torch.testing.assert_close(
            processed_logprobs(logits[i, j], top_p=0.7), processed_logprobs(logits[i, j][None], top_p=0.7)[0]
        )
    assert processed_logprobs(logits.bfloat16()).dtype == torch.float32
    exact = processed_logprobs(logits.double(), temperature=0.7, top_p=0.8)
    torch.testing.assert_close(exact.exp().sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_gradient_is_that_of_the_masked_softmax() -> None:
    logits = random_logits(2, 11).double().requires_grad_()
    token = processed_probs(logits.detach(), top_k=4).argmax(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(
        processed_logprobs(logits, temperature=0.5, top_k=4).gather(-1, token).sum(), logits
    )
    law = processed_probs(logits.detach(), temperature=0.5, top_k=4)
    expected = (torch.zeros_like(law).scatter(-1, token, 1.0) - law) / 0.5
    torch.testing.assert_close(gradient, expected)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(1, 600),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    rounded=st.booleans(),
    masked=st.booleans(),
    top_k=st.integers(0, 650),
    top_p=st.one_of(st.just(1.0), st.floats(1e-9, 1.0)),
    min_p=st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
)
def test_search_without_sorting_finds_the_same_floor(
    seed: int, vocabulary: int, scale: float, rounded: bool, masked: bool, top_k: int, top_p: float, min_p: float
) -> None:
    """Ties (bfloat16 logits), flat and extreme rows, -inf; at a boundary the two may differ by rounding of a sum."""
    logits = random_logits(3, vocabulary, seed, scale).double()
    logits = logits.bfloat16().double() if rounded else logits
    if masked:
        logits[:, 1::2] = -INF
    fast, slow = (kept_floor(logits, top_k, top_p, min_p, backend=b) for b in ("numba", "torch"))
    if fast is None:
        assert slow is None
        return
    assert slow is not None
    for row, mine, reference in zip(logits, fast, slow, strict=True):
        doubted = ((row >= mine) != (row >= reference)) & row.isfinite()
        if doubted.any():
            law = row.softmax(-1)
            rank = top_k if 0 < top_k <= vocabulary else vocabulary
            survivors = (law >= min_p * law.max()) & (row >= row.sort(descending=True).values[rank - 1])
            assert len(row[doubted].unique()) == 1
            above = law[row > row[doubted][0]].sum() / law[survivors].sum()
            assert float(above) == pytest.approx(top_p, abs=1e-12)


@pytest.mark.parametrize("backend", ("torch", "numba"))
@pytest.mark.parametrize("shared", (True, False), ids=("one setting", "a setting a row"))
def test_the_smallest_legal_settings_are_not_none(shared: bool, backend: Backend) -> None:
    """Shares that float32 rounds to 0 keep the most probable token alone, not everything."""
    params = [Params(top_p=7e-46), Params(top_p=7e-46 if shared else 0.5)]
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 1.0, 3.0]])
    probs = processed_probs(logits, backend=backend, **row_options(params, 3))
    assert probs.tolist() == [[0, 1, 0], [0, 0, 1]]


def test_a_temperature_that_takes_scores_out_of_range_is_an_error_and_no_law() -> None:
    logits = torch.tensor([[0.0, 2e37, 1.0], [1.0, 2.0, 3.0]])
    for temperature in (0.01, torch.tensor([0.01, 1.0])):
        with pytest.raises(NonFiniteLogits, match="row 0"):
            processed_probs(logits, temperature=temperature)
    assert score(logits, [Params(temperature=0.01), Params()]).broken == [0]
    assert score(logits, [Params(temperature=0.0), Params()]).broken == []


def test_greedy_is_one_rule_in_any_batch() -> None:
    """A temperature that float32 rounds up to the limit: alone or beside another, the lowest id of a tie."""
    just_below = Params(temperature=math.nextafter(GREEDY_BELOW, 0))
    for params in ([just_below], [just_below, Params()]):
        probs = processed_probs(torch.zeros(len(params), 4), **row_options(params, 4))
        assert probs[0].tolist() == [1, 0, 0, 0]


def test_non_finite_logits_name_model_and_row() -> None:
    logits = random_logits(5)
    logits[1, 3], logits[3, 0], logits[4] = math.nan, INF, -INF
    logits[2, :50] = -INF  # tokens that cannot be drawn are no fault
    with pytest.raises(NonFiniteLogits, match="draft: non-finite logits in row 1, row 3, row 4") as caught:
        processed_logprobs(logits, name="draft", temperature=0)
    assert caught.value.rows == [1, 3, 4]
    with pytest.raises(NonFiniteLogits, match="widen the allowed tokens"):
        processed_probs(random_logits(2), allowed=torch.zeros(97, dtype=torch.bool))
    assert processed_probs(logits[2:3]).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"temperature": -0.1}, "use 0 for greedy"),
        ({"temperature": math.nan}, "finite"),
        ({"top_p": 0.0}, r"in \(0, 1\]"),
        ({"top_p": 1.1}, "use 1 to switch it off"),
        ({"top_k": -2}, "0 to keep the whole"),
        ({"min_p": 1.5}, "use 0 to switch it off"),
        ({"repetition_penalty": 0.0}, "at least 0.01; use 1 to switch it off"),
        ({"repetition_penalty": 1e-39}, "at least 0.01; use 1 to switch it off"),
        ({"presence_penalty": math.inf}, "must be finite"),
        ({"logit_bias": {3: math.nan}}, "-inf to forbid"),
        ({"allowed_token_ids": ()}, "None to allow all"),
    ],
)
def test_mistakes_name_their_remedy(arguments: dict, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        Params(**arguments)
    (name,) = arguments
    if name in ("temperature", "top_p", "top_k", "min_p") and arguments[name] == arguments[name]:
        with pytest.raises(ValueError, match=remedy):
            processed_logprobs(random_logits(1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ({"logit_bias": {"3": 1.0}}, "logit_bias: token='3': must be a whole number"),
        ({"logit_bias": {3: "x"}}, "logit_bias of token 3='x': must be a number"),
        ({"logit_bias": [3]}, r"logit_bias=\[3\]: must be a mapping from token id to bias"),
        ({"allowed_token_ids": ("a",)}, "allowed_token_ids: token='a': must be a whole number"),
        ({"allowed_token_ids": 3}, "allowed_token_ids=3: must be token ids"),
        ({"allowed_token_ids": []}, "must name at least one token"),
        ({"temperature": "1"}, "temperature='1': must be a number"),
        ({"top_p": None}, "top_p=None: must be a number"),
        ({"top_k": 1.5}, "top_k=1.5: must be a whole number"),
        ({"seed": None}, "seed=None: must be a whole number"),
    ],
)
def test_values_of_another_type_name_their_field(arguments: dict, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        Params(**arguments)
    Params(temperature=np.float32(0.5), seed=np.int64(3), logit_bias={np.int64(3): 1}, allowed_token_ids=[1])  # type: ignore[arg-type]


def test_token_ids_outside_the_vocabulary_and_missing_history() -> None:
    with pytest.raises(ValueError, match="logit_bias names token 97, outside the vocabulary of 97"):
        Params(logit_bias={97: 1.0}).check_vocabulary(97)
    with pytest.raises(ValueError, match="allowed_token_ids names token -1"):
        Params(allowed_token_ids=(3, -1)).check_vocabulary(97)
    with pytest.raises(ValueError, match="pass prompt_ids and output_ids"):
        processed_logprobs(random_logits(1), presence_penalty=0.5)
    with pytest.raises(ValueError, match="pass prompts and outputs"):
        row_options([Params(presence_penalty=0.5)], 97)


def test_importing_spec_imports_no_torch() -> None:
    code = "import sys, spec, spec.random, spec.stats; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
