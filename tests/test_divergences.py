"""Values by hand, limits, invariants, closed-form gradients against autograd, TRL. n tokens, V vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onpolicy.losses import divergence, names, per_token
from onpolicy.losses._checks import resolve_options
from onpolicy.losses._scores import value_and_grad
from onpolicy.losses.divergences import log_probs

F_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl", "lk_alpha")
P, Q = [0.5, 0.25, 0.25], [0.25, 0.5, 0.25]  # student, teacher


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def hand(name: str) -> float:
    """The divergence of P and Q, worked out by hand."""
    log2 = math.log(2)
    kl = 0.25 * log2  # sum of .25 log(.25/.5) + .5 log(.5/.25) = .25 log 2, both ways round
    mixed_q = 0.25 * math.log(0.25 / 0.475) + 0.5 * math.log(0.5 / 0.275)  # m = .1 * own + .9 * other
    return {
        "forward_kl": kl,
        "reverse_kl": kl,
        "jsd": 0.25 * math.log(0.25 / 0.375) + 0.5 * math.log(0.5 / 0.375),
        "total_variation": 0.25,
        "skew_forward_kl": mixed_q,
        "skew_reverse_kl": mixed_q,  # P and Q are mirror images
        "adaptive_kl": kl,  # both directions equal, any weight
        "kd": 0.5 * log2 + 0.5 * kl,  # alpha = 1/2, token 0 has p = 1/2, T = 1
        "lk_alpha": -math.log(0.75),
        "lk_hybrid": (lam := math.exp(-3 * 0.75)) * kl + (1 - lam) * 0.25,
    }[name]


@pytest.mark.parametrize("name", names())
def test_value_is_the_one_worked_out_by_hand(name: str) -> None:
    value = per_token(name, logits(*P), logits(*Q), token_ids=torch.tensor([0]))
    assert value.item() == pytest.approx(hand(name), abs=1e-14)


def test_adaptive_weight_is_the_heads_share_of_the_gap() -> None:
    # Teacher's head for half of the mass: token 0 alone (.6). Gaps .3 | .2 + .1, so the weight of forward KL is 1/2.
    student, teacher = logits(0.3, 0.5, 0.2), logits(0.6, 0.3, 0.1)
    forward, reverse = per_token("forward_kl", student, teacher), per_token("reverse_kl", student, teacher)
    assert per_token("adaptive_kl", student, teacher).item() == pytest.approx(
        (0.5 * (forward + reverse)).item(), abs=1e-14
    )
    # With head_mass .7 the head is tokens 0 and 1: gaps .5 | .1.
    wider = per_token("adaptive_kl", student, teacher, head_mass=0.7)
    assert wider.item() == pytest.approx(((5 * forward + reverse) / 6).item(), abs=1e-14)


def test_kd_applies_temperature_to_the_soft_part_only() -> None:
    student, teacher = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    q, p = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    soft = (q * (q / p).log()).sum()
    hard = -student.softmax(-1)[0, 3].log()
    value = per_token("kd", student, teacher, temperature=2.0, token_ids=torch.tensor([3]), alpha=0.3)
    assert value.item() == pytest.approx((0.3 * hard + 0.7 * 4 * soft).item(), abs=1e-13)


def test_limits_of_jsd_and_skew() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    forward, reverse = per_token("forward_kl", s, t), per_token("reverse_kl", s, t)
    assert torch.equal(per_token("jsd", s, t, beta=0.0), forward)
    assert torch.equal(per_token("jsd", s, t, beta=1.0), reverse)
    torch.testing.assert_close(per_token("jsd", s, t, beta=1e-7) / 1e-7, forward, rtol=1e-5, atol=0)
    torch.testing.assert_close(per_token("jsd", s, t, beta=1 - 1e-7) / 1e-7, reverse, rtol=1e-5, atol=0)
    assert torch.equal(per_token("skew_forward_kl", s, t, skew=0.0), forward)
    assert torch.equal(per_token("skew_reverse_kl", s, t, skew=0.0), reverse)


@st.composite
def tables(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n, V] of both models and tokens [n]: any size, spread up to 1e4, some entries masked in both."""
    n, vocab = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    scale = draw(st.sampled_from([0.0, 0.1, 3.0, 30.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    s, t = ((torch.rand(n, vocab, generator=generator, dtype=torch.float64) * 2 - 1) * scale for _ in range(2))
    masked = draw(st.integers(0, vocab - 1))
    if draw(st.booleans()):
        s[:, masked + 1 :] = t[:, masked + 1 :] = -torch.inf
        ids = torch.randint(0, masked + 1, (n,), generator=generator)
    else:
        ids = torch.randint(0, vocab, (n,), generator=generator)
    return s.to(dtype), t.to(dtype), ids


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from(names()), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([None, 1, 3, 20]))
def test_closed_form_gradient_is_autograds(
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor], name: str, temperature: float, top_k: int | None
) -> None:
    s, t, ids = table
    s.requires_grad_()
    value = per_token(name, s, t, temperature=temperature, token_ids=ids, top_k=top_k)
    (grad,) = torch.autograd.grad(value.sum(), s)
    lp, lq = log_probs(s.detach(), temperature), log_probs(t, temperature)
    closed, closed_grad = value_and_grad(
        name, s.detach(), lp, lq, temperature=temperature, token_ids=ids, top_k=top_k, support="teacher",
        options=resolve_options(name, {}),
    )  # fmt: skip
    assert value.isfinite().all() and grad.isfinite().all()
    # Rounding alone, in units of the largest term (values reach 2e4 / T for extreme logits).
    assert (value - closed).abs().max() <= 1e-12 * max(1.0, value.abs().max().item())
    assert (grad - closed_grad).abs().max() <= 1e-10 * max(1.0, grad.abs().max().item())


@settings(deadline=None, max_examples=60)
@given(tables(torch.float32), st.sampled_from(names()))
def test_divergences_are_non_negative_and_zero_for_equal_models(
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor], name: str
) -> None:
    s, t, ids = table
    options: dict[str, Any] = {"alpha": 0.0} if name == "kd" else {}  # its hard part is no divergence
    assert (per_token(name, s, t, token_ids=ids, **options) >= -2e-6).all()
    same = s.clone().requires_grad_()
    value = per_token(name, same, s, token_ids=ids, **options)
    (grad,) = torch.autograd.grad(value.sum(), same)
    assert value.abs().max() <= 2e-6
    # At p = q every smooth divergence has gradient 0, and TV's subgradient is taken as 0 (each tie counts half).
    assert grad.abs().max() <= 2e-6


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from(F_DIVERGENCES), st.sampled_from(["teacher", "student"]))
def test_truncation_never_overestimates_and_is_monotone(
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor], name: str, support: str
) -> None:
    s, t, _ = table
    full = per_token(name, s, t)
    slack = 1e-12 * max(1.0, full.max().item())
    previous = torch.zeros_like(full)
    for k in range(1, s.shape[-1] + 1):
        truncated = per_token(name, s, t, top_k=k, support=support)  # type: ignore[arg-type]
        assert (truncated >= previous - slack).all() and (truncated <= full + slack).all()
        previous = truncated
    assert (previous - full).abs().max() <= slack


def test_truncation_bias_is_the_divergence_inside_the_bucket() -> None:
    # Chain rule of KL: full = truncated + q(tail) KL(q | tail || p | tail).
    torch.manual_seed(1)
    s, t = torch.randn(6, 11, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    inside = t.topk(4).indices
    tail_s, tail_t = s.scatter(-1, inside, -torch.inf), t.scatter(-1, inside, -torch.inf)
    mass = (tail_t.logsumexp(-1) - t.logsumexp(-1)).exp()
    expected = per_token("forward_kl", s, t) - mass * per_token("forward_kl", tail_s, tail_t)
    torch.testing.assert_close(per_token("forward_kl", s, t, top_k=4), expected, rtol=0, atol=1e-14)


def test_impossible_tokens() -> None:
    """-inf in one model only: infinite where mathematics says so, finite and differentiable elsewhere."""
    student, teacher = logits(0.5, 0.5, 0.0), logits(0.5, 0.25, 0.25)
    assert per_token("forward_kl", student, teacher).item() == math.inf
    assert per_token("reverse_kl", student, teacher).item() == pytest.approx(0.5 * math.log(2), abs=1e-14)
    assert per_token("reverse_kl", teacher, student).item() == math.inf
    assert per_token("total_variation", student, teacher).item() == pytest.approx(0.25, abs=1e-14)
    assert per_token("lk_alpha", logits(1.0, 0.0), logits(0.0, 1.0)).item() == math.inf
    assert per_token("forward_kl", student, teacher, top_k=2).item() == math.inf  # the whole tail is impossible
    for name in ("jsd", "total_variation", "skew_forward_kl", "skew_reverse_kl", "lk_alpha"):
        for a, b in ((student, teacher), (teacher, student)):
            a = a.clone().requires_grad_()
            value = per_token(name, a, b)
            (grad,) = torch.autograd.grad(value.sum(), a)
            assert value.isfinite().all() and grad.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(names()), st.integers(0, 2**16), st.booleans())
def test_masked_tokens_count_nowhere(name: str, seed: int, poison: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(2, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, 4, generator=generator) < 0.5
    ids = torch.randint(0, 7, (2, 4), generator=generator)
    if poison:
        s[~mask], t[~mask], ids[~mask] = torch.nan, -torch.inf, -100
    s.requires_grad_()
    loss, metrics = divergence(name, s, t, mask, token_ids=ids)
    (grad,) = torch.autograd.grad(loss, s)
    expected = [per_token(name, s[i, j], t[i, j], token_ids=ids[i, j]).detach() for i, j in mask.nonzero().tolist()]
    mean = torch.stack(expected).mean() if expected else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), mean, rtol=0, atol=1e-13)
    assert (grad[~mask] == 0).all() and (metrics["per_token"][~mask] == 0).all()
    halves = [divergence(name, s, t, part, token_ids=ids, denominator=8.0)[0] for part in _split(mask)]
    torch.testing.assert_close(halves[0] + halves[1], mean * len(expected) / 8, rtol=0, atol=1e-13)


def _split(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first = mask.clone()
    first[1] = False
    return first, mask & ~first


def test_padded_vocabulary_is_cut_and_temperature_divides_both() -> None:
    torch.manual_seed(2)
    s, t = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 11, dtype=torch.float64)
    value = per_token("reverse_kl", s, t, temperature=2.0)
    assert torch.equal(value, per_token("reverse_kl", s / 2, t[:, :8] / 2))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_agrees_with_trl(beta: float) -> None:
    reference = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    torch.manual_seed(3)
    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    teacher, teacher_head = torch.randn(6, 10), torch.randn(40, 10)
    theirs = reference.apply(hidden, head, None, teacher, teacher_head, None, beta, 1.5)[0]
    mine = per_token("jsd", hidden @ head.T, teacher @ teacher_head.T, temperature=1.5, beta=beta)
    # Both in float32, sums in different order: a few units in the last place of logits about 10.
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x.sum(), (hidden, head)) for x in (mine, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mistakes_name_their_remedy() -> None:
    s = torch.zeros(2, 3)
    mask = torch.ones(2, dtype=torch.bool)
    for call, message in [
        (lambda: per_token("reverse", s, s), "choose one of forward_kl"),
        (lambda: per_token("jsd", s, s, bta=0.5), "its options: beta"),
        (lambda: per_token("jsd", s, s, beta=1.5), r"\[0, 1\]"),
        (lambda: per_token("jsd", s, s, temperature=0.0), "temperature must be positive"),
        (lambda: per_token("kd", s, s), "pass token_ids"),
        (lambda: per_token("kd", s, s, token_ids=torch.tensor([0, 3])), "token ids must lie"),
        (lambda: per_token("jsd", s, s, top_k=0), "leave it out"),
        (lambda: divergence("jsd", s, s, mask.float()), "mask.bool"),
        (lambda: divergence("jsd", s, s, mask, denominator=0.0), "denominator must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
