"""The bounded-memory loss against the eager one: values, gradients, masks, dtypes, heads of every kind."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy.losses import _fused, chunked, chunked_logprobs, chunked_reduce, divergence, iter_logprobs, names
from onpolicy.losses._checks import resolve_options
from onpolicy.losses._chunk_kernels import Divergence, evaluate_chunk

Tensors = dict[str, torch.Tensor]
Outcome = tuple[torch.Tensor, Tensors, list[torch.Tensor]]  # loss, metrics, gradients of hidden, head, bias
# Float64: rounding alone. Float32: sums of float32 products. bf16: logits are exact to float32, the gradient by the
# logits is rounded to 8 bits once, and so is the result.
VALUE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-5}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-5, torch.bfloat16: 2e-2}


def problem(dtype: torch.dtype, tokens: int, vocab: int, seed: int = 0, padding: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "hidden": draw(tokens, 6).requires_grad_(),
        "head": draw(vocab, 6).requires_grad_(),
        "bias": draw(vocab).requires_grad_(),
        "teacher": draw(tokens, 4),
        "teacher_head": draw(vocab + padding, 4),
        "mask": torch.rand(tokens, generator=generator) < 0.7,
        "ids": torch.randint(0, vocab, (tokens,), generator=generator),
        "weights": torch.rand(tokens, generator=generator),
    }


def eager(name: str, x: Tensors, options: dict[str, Any]) -> Outcome:
    """Loss, metrics and gradients by autograd in float64, from the same values."""
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in x.items()}
    leaves = [wide[k].requires_grad_() for k in ("hidden", "head", "bias")]
    student = wide["hidden"] @ wide["head"].T + wide["bias"]
    teacher = wide["teacher"] @ wide["teacher_head"].T
    loss, metrics = divergence(
        name, student, teacher, x["mask"], token_ids=x["ids"], weights=wide["weights"], **options
    )  # fmt: skip
    return loss.detach(), metrics, list(torch.autograd.grad(loss, leaves))


def bounded(name: str, x: Tensors, chunk_size: int | None, options: dict[str, Any]) -> Outcome:
    loss, metrics = chunked(
        name, x["hidden"], x["head"], x["teacher"], x["teacher_head"], x["mask"], student_bias=x["bias"],
        token_ids=x["ids"], weights=x["weights"], chunk_size=chunk_size, **options,
    )  # fmt: skip
    return loss.detach(), metrics, list(torch.autograd.grad(loss, (x["hidden"], x["head"], x["bias"])))


def assert_same(name: str, x: Tensors, chunk_size: int | None = None, **options: Any) -> None:
    dtype = x["hidden"].dtype
    loss, metrics, grads = bounded(name, x, chunk_size, options)
    expected, expected_metrics, expected_grads = eager(name, x, options)
    scale = max(1.0, expected_metrics["per_token"].abs().max().item() if len(x["mask"]) else 1.0)
    assert abs(loss.item() - expected.item()) <= VALUE_TOLERANCE[dtype] * scale
    for key, value in expected_metrics.items():
        assert (metrics[key].double() - value).abs().sum() <= VALUE_TOLERANCE[dtype] * scale * max(1, len(x["mask"]))
    for got, want in zip(grads, expected_grads, strict=True):
        assert got.dtype == dtype and got.isfinite().all()
        assert (got.double() - want).abs().sum() <= GRAD_TOLERANCE[dtype] * (want.abs().sum() + 1e-2 * scale)


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("name", names())
def test_float64_equals_the_eager_loss(name: str, top_k: int | None) -> None:
    assert_same(name, problem(torch.float64, 13, 29, padding=3), chunk_size=4, temperature=1.3, top_k=top_k)


@settings(deadline=None, max_examples=80)
@given(
    name=st.sampled_from(names()),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tokens=st.integers(0, 9),
    vocab=st.integers(2, 40),
    chunk_size=st.sampled_from([None, 1, 3]),
    temperature=st.sampled_from([0.7, 1.0, 2.0]),
    top_k=st.sampled_from([None, None, 2]),
    denominator=st.sampled_from([None, 5.0]),
    seed=st.integers(0, 2**20),
)
def test_any_shape_mask_and_dtype(
    name: str, dtype: torch.dtype, tokens: int, vocab: int, seed: int, **options: Any
) -> None:
    assert_same(name, problem(dtype, tokens, vocab, seed), **options)


@pytest.mark.parametrize("name", names())
def test_extreme_logits_and_masked_vocabulary(name: str) -> None:
    """Logits of 1e4 either way, entries at -inf in both models: finite, and equal to the eager loss in float64."""
    torch.manual_seed(0)
    n, vocab = 6, 50
    what = Divergence(name, resolve_options(name, {}))
    student, teacher = ((torch.rand(n, vocab) * 2 - 1) * 10.0 ** torch.arange(-1, 5)[:n, None] for _ in range(2))
    student[:, 7:12] = teacher[:, 7:12] = -math.inf
    ids = torch.full((n,), 3)
    ones = torch.ones(n)
    results = []
    for dtype in (torch.float32, torch.float64):
        grad = student.to(dtype, copy=True)
        results.append((evaluate_chunk(what, grad, teacher.to(dtype, copy=True), ids, ones.to(dtype), None), grad))
    (low, low_grad), (high, high_grad) = results
    for got, want in zip(low[:4], high[:4], strict=True):
        assert got is not None and want is not None and got.isfinite().all()
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    # p (lp - lq) of logits 1e4 apart carries their rounding, 1e4 * 2^-24, into each entry.
    torch.testing.assert_close(low_grad.double(), high_grad, rtol=1e-4, atol=2e-3)
    assert (low_grad[:, 7:12] == 0).all()


@pytest.mark.parametrize("name", [n for n in names() if _fused.supports(n, torch.zeros(1, 1))])
def test_fused_kernels_agree_with_torch_at_the_edges(name: str) -> None:
    """Infinite where torch's path is infinite, NaN where a logit is NaN, long rows summed as accurately."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(4, 9001, generator=generator) * 3 for _ in range(2))
    student[1, 5] = -math.inf
    teacher[2, 6] = -math.inf
    student[3, 8] = math.nan
    options = resolve_options(name, {})
    fused, *_ = _fused.run(name, options, 1.0, student.clone(), teacher.clone(), None, None, None)
    plain = evaluate_chunk(Divergence(name, options), student.double(), teacher.double(), None, None, None).value
    torch.testing.assert_close(fused.double(), plain, rtol=2e-5, atol=2e-6, equal_nan=True)
    assert plain[3].isnan()


def test_masked_tokens_are_never_projected() -> None:
    x = problem(torch.float32, 6, 11)
    x["mask"] = torch.tensor([True, False, True, True, False, True])
    with torch.no_grad():
        x["hidden"][1], x["teacher"][4], x["ids"][1] = torch.nan, torch.inf, -100
    loss, metrics, grads = bounded("reverse_kl", x, None, {})
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert (grads[0][~x["mask"]] == 0).all() and (metrics["per_token"][~x["mask"]] == 0).all()


def test_no_tokens_is_zero_with_a_graph() -> None:
    for tokens in (0, 5):
        x = problem(torch.bfloat16, tokens, 11)
        x["mask"] = torch.zeros(tokens, dtype=torch.bool)
        loss, _, grads = bounded("jsd", x, None, {})
        assert loss == 0 and all((g == 0).all() for g in grads)


def test_micro_batches_add_up_to_the_whole() -> None:
    x = problem(torch.float64, 10, 17)
    args = (x["hidden"], x["head"], x["teacher"], x["teacher_head"])
    whole = torch.autograd.grad(chunked("jsd", *args)[0], (x["hidden"], x["head"]))
    losses = [
        chunked("jsd", args[0][part], args[1], args[2][part], args[3], denominator=10.0)[0]
        for part in (slice(0, 3), slice(3, 10))
    ]
    parts = torch.autograd.grad(losses[0] + losses[1], (x["hidden"], x["head"]))
    for got, want in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_tied_embedding_and_lora_on_the_head() -> None:
    """The head may be an embedding used below as well, or W + s B A: autograd carries the gradient on."""
    x = problem(torch.float64, 8, 19)
    ids = x["ids"]
    weight, a, b = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((19, 6), (2, 6), (19, 2)))
    teacher = x["teacher"] @ x["teacher_head"].T

    def gradients(bound: bool) -> tuple[torch.Tensor, ...]:
        hidden = torch.nn.functional.embedding(ids, weight).tanh()  # tied
        head = weight + 0.5 * b @ a
        if bound:
            loss = chunked("reverse_kl", hidden, head, x["teacher"], x["teacher_head"], chunk_size=3)[0]
        else:
            loss = divergence("reverse_kl", hidden @ head.T, teacher, None)[0]
        return torch.autograd.grad(3 * loss, (weight, a, b))  # the factor tests backward's scaling

    for got, want in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_autocast_with_float32_master_weights() -> None:
    x = problem(torch.float32, 12, 33)
    args = (x["hidden"], x["head"], x["teacher"], x["teacher_head"])
    expected = torch.autograd.grad(chunked("reverse_kl", *args)[0], args[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked("reverse_kl", *args)[0]
    got = torch.autograd.grad(loss, args[:2])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2e-2 * b.norm()  # operands rounded to bf16's 8 bits


def test_logits_of_bf16_models_are_not_rounded() -> None:
    """Above 16, bf16 logits step by 1/8: log-probabilities made of them would be off by up to 0.06."""
    torch.manual_seed(0)
    hidden, head = torch.randn(300, 64).bfloat16(), (torch.randn(200, 64) * 2).bfloat16()
    ids = torch.randint(0, 200, (300,))
    exact = torch.log_softmax(hidden.double() @ head.double().T, -1).gather(1, ids[:, None])[:, 0]
    got = chunked_logprobs(hidden, head, ids)
    # float32 rounding of logits up to 64 and sums of 64 products
    assert got.dtype == torch.float32 and (got.double() - exact).abs().max() < 1e-4
    rounded = torch.log_softmax((hidden @ head.T).float(), -1).gather(1, ids[:, None])[:, 0]
    assert (rounded.double() - exact).abs().max() > 1e-2  # what this guards against


@settings(deadline=None, max_examples=30)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    tokens=st.integers(0, 7),
    chunk_size=st.sampled_from([None, 1, 2]),
    temperature=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 2**20),
)
def test_logprobs_and_their_gradient(
    dtype: torch.dtype, tokens: int, chunk_size: int | None, temperature: float, seed: int
) -> None:
    x = problem(dtype, tokens, 23, seed)
    leaves = [x[k] for k in ("hidden", "head", "bias")]
    values = chunked_logprobs(
        x["hidden"], x["head"], x["ids"], temperature=temperature, chunk_size=chunk_size, bias=x["bias"]
    )
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = (wide[0] @ wide[1].T + wide[2]) / temperature
    expected = torch.log_softmax(logits, -1).gather(1, x["ids"][:, None])[:, 0]
    assert (values.double() - expected).abs().sum() <= VALUE_TOLERANCE[dtype] * max(1, tokens) * 10
    signed = x["weights"] - 0.5  # policy-gradient weights have both signs
    got = torch.autograd.grad((values * signed).sum(), leaves)
    want = torch.autograd.grad((expected * signed).sum(), wide)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().sum() <= GRAD_TOLERANCE[dtype] * (b.abs().sum() + 1e-2)


def test_reductions_over_full_distributions() -> None:
    x = problem(torch.float64, 7, 13, padding=2)
    args = (x["hidden"], x["head"], x["teacher"], x["teacher_head"])
    _, metrics = chunked("total_variation", *args)
    acceptance = chunked_reduce(*args, lambda p, q: {"alpha": torch.minimum(p, q).exp().sum(-1)}, chunk_size=2)["alpha"]
    torch.testing.assert_close(acceptance, 1 - metrics["per_token"], rtol=0, atol=1e-14)
    pairs = list(iter_logprobs(*args, chunk_size=3))
    assert sum(len(p) for p, _ in pairs) == 7 and not any(p.requires_grad for p, _ in pairs)
    expected = (x["teacher"] @ x["teacher_head"][:13].T).log_softmax(-1)
    torch.testing.assert_close(torch.cat([q for _, q in pairs]), expected, rtol=0, atol=1e-13)


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    x = problem(torch.float64, 5, 11)
    frozen = x["head"].detach()
    loss, _ = chunked("jsd", x["hidden"], frozen, x["teacher"], x["teacher_head"])
    (grad,) = torch.autograd.grad(loss, x["hidden"])
    trained, _ = chunked("jsd", x["hidden"], x["head"], x["teacher"], x["teacher_head"])
    (other,) = torch.autograd.grad(trained, x["hidden"])
    torch.testing.assert_close(grad, other, rtol=0, atol=0)
    with torch.no_grad():
        assert not chunked("jsd", x["hidden"], x["head"], x["teacher"], x["teacher_head"])[0].requires_grad


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd"])
def test_agrees_with_trl_in_bf16(loss: str) -> None:
    reference = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    x = problem(torch.bfloat16, 40, 300)
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[loss]
    theirs = reference.apply(x["hidden"], x["head"], None, x["teacher"], x["teacher_head"], None, beta, 0.8)[0]
    mine, metrics = chunked(loss, x["hidden"], x["head"], x["teacher"], x["teacher_head"], temperature=0.8)
    torch.testing.assert_close(metrics["per_token"], theirs.detach(), rtol=1e-5, atol=1e-5)
    leaves = (x["hidden"], x["head"])
    for a, b in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs.mean(), leaves), strict=True):
        assert (a.float() - b.float()).norm() <= 5e-3 * b.float().norm()  # both rounded to bf16, 2^-9 apiece


_MEMORY = """
import sys, torch
from pathlib import Path
from onpolicy.losses import chunked
torch.set_num_threads(1)
def field(name): return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) / 1024
def step(n, vocab):
    h, w = torch.randn(n, 16).bfloat16().requires_grad_(), torch.randn(vocab, 16).bfloat16().requires_grad_()
    before = field("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    chunked("jsd", h, w, h.detach(), w.detach(), chunk_size=32)[0].backward()
    return field("VmHWM") - before
step(8, 64)
print(step(int(sys.argv[1]), 20000))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_peak_memory_does_not_grow_with_tokens() -> None:
    few, many = (
        float(subprocess.run([sys.executable, "-c", _MEMORY, n], capture_output=True, text=True, check=True).stdout)
        for n in ("64", "1024")
    )
    # The 960 further tokens would take 73 MiB a model as float32 logits; allocator noise is a few MiB.
    assert many < few + 12, f"{few:.1f} MiB for 64 tokens, {many:.1f} MiB for 1024"


def test_mistakes_name_their_remedy() -> None:
    x = problem(torch.float32, 4, 9)
    args = (x["hidden"], x["head"], x["teacher"], x["teacher_head"])
    for call, message in [
        (lambda: chunked("jsd", *args[:2], x["teacher"][:3], args[3]), "flatten batch and positions"),
        (lambda: chunked("jsd", args[0], x["teacher_head"], *args[2:]), "student's head must be"),
        (lambda: chunked("jsd", *args, chunk_size=0), "leave it out"),
        (lambda: chunked("jsd", *args, x["mask"].int()), "mask.bool"),
        (lambda: chunked("jsd", *args, token_ids=torch.full((4,), 9)), "token ids must lie"),
        (lambda: chunked("kd", *args), "pass token_ids"),
        (lambda: chunked("jsd", *args, weigths=1.0), "no option weigths"),
        (lambda: chunked_logprobs(*args[:2], torch.tensor([1])), "one a row of hidden"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_head_gradient_goes_where_it_is_told() -> None:
    x = problem(torch.float64, 9, 11)
    given = (x["hidden"], x["head"], x["teacher"], x["teacher_head"], x["mask"])
    loss, _ = chunked("jsd", *given, chunk_size=4)
    hidden, head = torch.autograd.grad(loss, (x["hidden"], x["head"]))
    sink = torch.ones_like(head)
    loss, _ = chunked("jsd", *given, chunk_size=4, head_grad=sink)
    told_hidden, told_head = torch.autograd.grad(loss, (x["hidden"], x["head"]), allow_unused=True)
    assert told_head is None
    torch.testing.assert_close(told_hidden, hidden)
    torch.testing.assert_close(sink, head + 1)

    values = chunked_logprobs(x["hidden"], x["head"], x["ids"], chunk_size=4)
    (expected,) = torch.autograd.grad(values @ x["weights"].double(), x["head"])
    sink = torch.ones_like(head)
    values = chunked_logprobs(x["hidden"], x["head"], x["ids"], chunk_size=4, head_grad=sink)
    (values @ x["weights"].double()).backward()
    torch.testing.assert_close(sink, expected + 1)


def test_a_head_gradient_already_given_away_cannot_be_scaled() -> None:
    x = problem(torch.float64, 5, 7)
    sink = torch.zeros_like(x["head"])
    loss, _ = chunked("reverse_kl", x["hidden"], x["head"], x["teacher"], x["teacher_head"], head_grad=sink)
    with pytest.raises(RuntimeError, match="put the factor into weights or denominator"):
        (2 * loss).backward()
    with pytest.raises(ValueError, match="both must be alike"):
        chunked("reverse_kl", x["hidden"], x["head"], x["teacher"], x["teacher_head"], head_grad=sink[:3])


def test_buffers_kept_between_calls_hold_nothing_that_is_read_again() -> None:
    """Two losses whose backward passes come later, in the other order, and with heads of different size."""
    one, two = problem(torch.bfloat16, 9, 40), problem(torch.bfloat16, 17, 23, seed=1)

    def losses(x: Tensors) -> torch.Tensor:
        kl, _ = chunked("reverse_kl", x["hidden"], x["head"], x["teacher"], x["teacher_head"], chunk_size=4)
        return kl + chunked_logprobs(x["hidden"], x["head"], x["ids"], chunk_size=4).mean()

    alone = [torch.autograd.grad(losses(x), (x["hidden"], x["head"])) for x in (one, two)]
    first, second = losses(one), losses(two)
    later = torch.autograd.grad(second, (two["hidden"], two["head"]))
    for x, y in zip(torch.autograd.grad(first, (one["hidden"], one["head"])) + later, alone[0] + alone[1], strict=True):
        assert torch.equal(x, y)
