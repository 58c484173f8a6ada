"""The fast forward pass: against transformers, and to the bit against itself in other company."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from spec.kv_cache import Pool
from spec.models import kernels_numba as kernels
from spec.models.base import Step
from spec.models.decoder import Decoder
from spec.models.linear import make_linear
from spec.models.load import load
from spec.models.transformers_model import TransformersModel
from spec.models.weights import UnsupportedModel, read

SIZES = {
    "vocab_size": 80, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
KINDS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama3-rope": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}  # fmt: skip


def tiny(kind: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: at their defaults a dropped one would not show
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def step(tokens: list[list[int]], slots: list[int], starts: list[int], last_only: bool = False) -> Step:
    lengths = np.array([len(ids) for ids in tokens])
    rows = np.cumsum(lengths) - 1 if last_only else np.arange(lengths.sum())
    flat = torch.tensor([token for ids in tokens for token in ids])
    return Step(flat, np.array(slots), np.array(starts), lengths, rows)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], count).tolist()


def alone(model: Decoder, tokens: list[int]) -> torch.Tensor:
    slot = model.open(len(tokens))
    assert slot is not None
    logits = model.forward(step([tokens], [slot], [0]))
    model.close(slot)
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_transformers(kind: str) -> None:
    model = tiny(kind)
    tokens = ids(40)
    expected = model(torch.tensor([tokens])).logits[0].detach()
    torch.testing.assert_close(alone(Decoder(read(model, kind)), tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_near_to_float32_as_transformers_bf16(kind: str) -> None:
    low = tiny(kind, torch.bfloat16)
    tokens = ids(70)
    with torch.no_grad():
        theirs = low(torch.tensor([tokens])).logits[0].float()
        exact = tiny(kind, torch.bfloat16).float()(torch.tensor([tokens])).logits[0]
    ours = alone(Decoder(read(low, kind)), tokens)
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_any_shape_give_the_same_logits(dtype: torch.dtype) -> None:
    """Prefill in chunks, drafts rejected and written over, sequences in company: as one pass alone."""
    model = Decoder(read(tiny(dtype=dtype), "tiny"), cache_tokens=512)
    one, two = ids(60), ids(25, 1)
    expected_one, expected_two = alone(model, one), alone(model, two)
    a, b = model.open(70), model.open(70)
    assert a is not None and b is not None
    parts = [model.forward(step([one[:23], two[:3]], [a, b], [0, 0]))]
    model.forward(step([[7, 7, 7], [9] * 5], [a, b], [23, 3]))  # rejected
    parts.append(model.forward(step([two[3:20], one[23:24]], [b, a], [3, 23])))
    parts.append(model.forward(step([one[24:], two[20:]], [a, b], [24, 20])))
    got_one = torch.cat([parts[0][:23], parts[1][17:], parts[2][:36]])
    got_two = torch.cat([parts[0][23:], parts[1][:17], parts[2][36:]])
    tolerance = {"rtol": 0.0, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got_one, expected_one, **tolerance)
    torch.testing.assert_close(got_two, expected_two, **tolerance)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_threads_change_no_bit(quantization, monkeypatch) -> None:
    """One thread has kernels of its own: a prompt, then steps of several sequences, long ago begun."""
    model = Decoder(read(tiny(dtype=torch.bfloat16), "tiny"), quantization=quantization)
    ran: Counter[str] = Counter()

    def counted(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def run(*given: object) -> None:
            ran[name] += 1
            kernel(*given)

        return run

    for name in ("attend_parallel", "silu_mul_parallel"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))

    def logits(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            slots = [model.open(150) for _ in range(3)]
            parts = [model.forward(step([ids(90, 1), ids(80, 2), ids(5, 3)], slots, [0, 0, 0]))]  # type: ignore[arg-type]
            parts.append(model.forward(step([ids(4, 4), ids(1, 5), ids(30, 6)], slots, [90, 77, 5])))  # type: ignore[arg-type]
        finally:
            torch.set_num_threads(before)
        for slot in slots:
            model.close(slot)  # type: ignore[arg-type]
        return torch.cat(parts)

    one = logits(1)
    assert not ran
    assert torch.equal(logits(2), one)
    assert ran == {"attend_parallel": 2 * 3, "silu_mul_parallel": 3}  # steps times layers; the second has few rows


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_models_do_not_depend_on_company_either(quantization) -> None:
    model = Decoder(read(tiny(dtype=torch.bfloat16), "tiny"), quantization=quantization)
    tokens = ids(40)
    whole = alone(model, tokens)
    a, b = model.open(50), model.open(50)
    assert a is not None and b is not None
    model.forward(step([tokens[:9]], [a], [0]))
    rest = model.forward(step([ids(11, 3), tokens[9:]], [b, a], [0, 9]))[11:]
    assert torch.equal(rest, whole[9:])


def test_a_fork_shares_what_was_computed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = Decoder(read(tiny(dtype=dtype), "tiny"))
        tokens = ids(45)
        expected = alone(model, tokens)
        source, target = model.open(50), model.open(50)
        assert source is not None and target is not None
        model.forward(step([tokens[:37]], [source], [0]))
        model.fork(source, target, 37)
        model.forward(step([[1] * 5], [source], [30]))  # what the source does later is its own
        got = model.forward(step([tokens[37:]], [target], [37]))
        torch.testing.assert_close(got, expected[37:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_an_earlier_sequence_is_left_in_a_slot(dtype: torch.dtype) -> None:
    """A long sequence in the same step, for one that is padded to it looks farther than its own end."""
    model = Decoder(read(tiny(dtype=dtype), "tiny"), cache_tokens=128)
    one, two = ids(30), ids(60, 1)
    expected = torch.cat([alone(model, one), alone(model, two)])
    for cache in (model._ops._keys, model._ops._values):  # type: ignore[attr-defined]
        for layer in cache:
            layer[:] = 0x7FC0 if dtype == torch.bfloat16 else torch.nan  # the bits of NaN: 0 * NaN would be seen
    a, b = model.open(40), model.open(60)
    assert a is not None and b is not None
    got = model.forward(step([one, two], [a, b], [0, 0]))
    tolerance = {"rtol": 0.0, "atol": 0.0} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, expected, **tolerance)


def test_only_wanted_rows_and_only_the_vocabulary() -> None:
    model = tiny(dtype=torch.bfloat16)
    tokens = ids(20)
    everything = alone(Decoder(read(model, "tiny")), tokens)
    vocabulary = torch.tensor([3, 17, 40, 41, 79])
    small = Decoder(read(model, "tiny"), vocabulary=vocabulary)
    assert small.vocab_size == 5
    slot = small.open(20)
    assert slot is not None
    got = small.forward(step([tokens], [slot], [0], last_only=True))
    torch.testing.assert_close(got, everything[-1:, vocabulary], rtol=0, atol=0)


def test_quantised_products_are_those_of_the_rounded_weights() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 96).bfloat16(), torch.randn(5, 96).bfloat16()
    exact = x.float() @ weight.float().T
    # Half a step of 255 (of 15) over a row's (a group's) range, root mean square, per weight.
    for quantization, bound in (("int8", 0.02), ("int4", 0.15)):
        off = (make_linear(weight, quantization=quantization)(x).float() - exact).norm() / exact.norm()
        assert 1e-4 < off < bound, quantization
    with pytest.raises(ValueError, match="multiple of 32"):
        make_linear(weight[:, :50], quantization="int4")
    with pytest.raises(ValueError, match="bf16 model on a CPU"):
        make_linear(weight.float(), quantization="int8")
    with pytest.raises(ValueError, match="choose one of none, int8, int4"):
        make_linear(weight, quantization="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["mkldnn", "bf16"])
def test_where_onednn_has_no_bf16_products_torchs_own_are_used(missing: str, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("mkldnn_bf16 path needs a cpu with AVX512")

    if missing == "mkldnn":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(32, 64).bfloat16(), torch.randn(32).bfloat16(), torch.randn(3, 64).bfloat16()
    assert torch.equal(make_linear(weight, bias)(x), torch.nn.functional.linear(x, weight, bias))


def test_bias_is_added_in_every_kind() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(32, 64).bfloat16(), torch.randn(32).bfloat16(), torch.zeros(3, 64).bfloat16()
    for quantization in ("none", "int8", "int4", "unpacked"):
        assert torch.equal(make_linear(weight, bias, quantization)(x), bias.expand(3, -1))  # type: ignore[arg-type]


def test_models_it_does_not_know_are_named() -> None:
    sliding = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    with pytest.raises(UnsupportedModel, match="sliding window"):
        read(sliding, "m")
    config = LlamaConfig(**SIZES, attention_bias=True)
    with pytest.raises(UnsupportedModel, match="biases"):
        read(LlamaForCausalLM(config), "m")


def test_loading(tmp_path) -> None:
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path / "llama")
    model = load(tmp_path / "llama", device="cpu")
    assert isinstance(model, Decoder) and model.num_parameters == sum(p.numel() for p in tiny().parameters())
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).save_pretrained(tmp_path / "sliding")
    with pytest.warns(UserWarning, match="several times slower: it attends to a sliding window"):
        assert isinstance(load(tmp_path / "sliding", device="cpu"), TransformersModel)
    with pytest.raises(ValueError, match="no fast forward pass"):
        load(tmp_path / "sliding", device="cpu", quantization="int8")
    with pytest.raises(ValueError, match="no such model directory"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("vocabulary", [None, torch.arange(0, 80, 5)], ids=["whole", "reduced"])
def test_a_model_with_a_hidden_difference_is_refused(quantization, vocabulary, tmp_path, monkeypatch) -> None:
    """Quantised or not: what is decoded then is said to be the quantised target, exactly."""
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path)
    options = {"device": "cpu", "quantization": quantization, "vocabulary": vocabulary}
    model = load(tmp_path, **options)
    weights = read(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), "m")
    direct = Decoder(weights, quantization=quantization, vocabulary=vocabulary)
    assert torch.equal(alone(model, ids(20)), alone(direct, ids(20)))
    monkeypatch.setattr("spec.models.weights._norm", lambda module: torch.ones_like(module.weight).float())
    with pytest.raises(ValueError, match="differs from transformers' by"):
        load(tmp_path, **options)


def test_capacity() -> None:
    model = Decoder(read(tiny(), "tiny"), cache_tokens=64)
    with pytest.raises(ValueError, match="more than the 64 positions"):
        model.open(65)
    first, second = model.open(40), model.open(10)
    assert first is not None and second is not None and model.open(20) is None
    model.close(first)
    assert model.open(40) == first


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 90)), max_size=60))
def test_pool_spans_never_overlap_and_all_come_back(actions: list[tuple[bool, int]]) -> None:
    pool = Pool(200)
    held = []
    for allocate, number in actions:
        if allocate:
            span = pool.allocate(number)
            if span is not None:
                assert span.length >= number and span.start % 16 == 0 and span.start + span.length <= 192
                held.append(span)
        elif held:
            pool.release(held.pop(number % len(held)))
        taken = sorted((span.start, span.start + span.length) for span in held)
        assert all(a[1] <= b[0] for a, b in pairwise(taken))
        assert pool.free == 192 - sum(span.length for span in held)
    for span in held:
        pool.release(span)
    assert pool.allocate(192) is not None


@pytest.mark.parametrize("shape", [(96, 64), (48, 1536)])
def test_a_row_of_a_product_does_not_depend_on_how_many_there_are(shape) -> None:
    torch.manual_seed(0)
    linear, x = make_linear(torch.randn(shape).bfloat16()), torch.randn(300, shape[1]).bfloat16()
    alone = torch.cat([linear(row[None]) for row in x])
    for rows in (2, 5, 16, 33, 300):
        assert torch.equal(linear(x[:rows]), alone[:rows])


def test_products_in_tiles_are_the_same_products(monkeypatch) -> None:
    """On machines whose kernels agree for no numbers of rows."""
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64).bfloat16(), torch.randn(41, 64).bfloat16()
    expected = make_linear(weight)(x)
    monkeypatch.setattr("spec.models.linear._agreements", {(32, 64): (16, 16)})
    assert torch.equal(make_linear(weight)(x), expected)
