"""Estimators by hand, by naive loops, under masks, cuts of the batch and extreme numbers."""

from __future__ import annotations

import math
import multiprocessing
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from onpolicy.losses.advantages import moments, returns_to_go, task_credit, whiten
from onpolicy.losses.estimators import EstimatorOptions, policy_gradient, token_advantages
from onpolicy.losses.importance import clipped_surrogate, importance_ratios, mask_ratios, ratio_metrics, truncate_ratios
from onpolicy.losses.normalise import Normalisation, batch_count
from onpolicy.losses.rewards import (
    combine_teachers,
    expected_rewards,
    k1,
    k2,
    k3,
    least_variance_baseline,
    token_rewards,
)
from onpolicy.losses.segments import prefix_sums, suffix_sums

NAN = float("nan")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """A random batch, with some tokens masked."""
    generator, n = torch.Generator().manual_seed(seed), sum(lengths)
    student, sampler, teacher = torch.randn(3, n, generator=generator, dtype=torch.float64) - 2
    return {
        "student_logprobs": student,
        "sampler_logprobs": student + 0.3 * (sampler + 2),
        "teacher_logprobs": teacher,
        "sequence_ids": ids(*lengths),
        "mask": torch.rand(n, generator=generator) > 0.25,
    }


def loss_and_gradient(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaf = arguments["student_logprobs"].clone().requires_grad_()
    loss, metrics = policy_gradient(**(arguments | {"student_logprobs": leaf}), **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, metrics


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"estimate": "k2", "place": "loss", "normalisation": "sequence"},
    {"estimate": "k3", "place": "ratio", "ratio_level": "sequence"},
    {"discount": 1.0, "correction": "clip", "normalisation": "sequence"},
    {"discount": 1.0, "correction": "mask", "ratio_level": "prefix"},
    {"estimate": "k3", "whitening": "mean_std"},
]


# --- by hand ---


def test_rewards_by_hand() -> None:
    student, teacher = double(math.log(0.5), math.log(0.2)), double(math.log(0.25), math.log(0.4))
    torch.testing.assert_close(token_rewards(teacher, student), double(-math.log(2), math.log(2)))
    torch.testing.assert_close(k1(student, teacher), double(math.log(2), -math.log(2)))
    torch.testing.assert_close(k2(student, teacher), double(1, 1) * math.log(2) ** 2 / 2)
    torch.testing.assert_close(k3(student, teacher), double(0.5 - 1 + math.log(2), 2 - 1 - math.log(2)))
    clipped = token_rewards(teacher, student, clip=0.5)
    assert clipped.tolist() == [-0.5, 0.5]


def test_extrapolation_by_hand() -> None:
    """λ = 2: 2 (log T - log R) - (log S - log R)."""
    student, teacher, reference = double(-1.0), double(-2.0), double(-5.0)
    rewards = token_rewards(teacher, student, reference_logprobs=reference, extrapolation=2.0)
    assert rewards.tolist() == [2 * 3 - 4]
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        token_rewards(teacher, student, extrapolation=2.0)


def test_default_loss_by_hand() -> None:
    """Two tokens, ratios 1 and e (truncated to 2), rewards 1 and -3: gradient -(weight * reward) / 2."""
    arguments = {
        "student_logprobs": double(-2, -1),
        "sampler_logprobs": double(-2, -2),
        "teacher_logprobs": double(-1, -4),
        "sequence_ids": ids(2),
        "mask": torch.tensor([True, True]),
    }
    loss, gradient, metrics = loss_and_gradient(arguments)
    assert gradient.tolist() == [-0.5, 3.0]
    assert float(loss) == pytest.approx((-1 * -2 + 2 * 3 * -1) / 2)
    assert float(metrics["kl/k1"]) == 1.0
    assert float(metrics["ratio/max"]) == pytest.approx(math.e)
    assert float(metrics["ratio/changed"]) == 0.5
    assert float(metrics["ratio/ess"]) == pytest.approx((1 + math.e) ** 2 / (2 * (1 + math.e**2)))


def test_teachers_are_weighted_and_may_be_absent() -> None:
    first, second = double(-1, -2), double(-3, NAN)
    routed = combine_teachers([first, second], torch.tensor([[0.25, 1.0], [0.75, 0.0]]))
    assert routed.tolist() == [-2.5, -2.0]
    assert combine_teachers([first, first * 3], [0.5, 0.5]).tolist() == [-2.0, -4.0]
    for weights in ([0.5, 0.6], [1.5, -0.5], [1.0]):
        with pytest.raises(ValueError, match="weights"):
            combine_teachers([first, second], weights)


@pytest.mark.parametrize(("placement", "expected"), [("sequence", [2, 2, 0, 5]), ("last", [0, 2, 0, 5])])
def test_task_credit(placement: Any, expected: list[float]) -> None:
    mask = torch.tensor([True, True, False, True])
    assert task_credit(double(2, 5), ids(3, 1), mask, placement).tolist() == expected
    with pytest.raises(ValueError, match="give one each"):
        task_credit(double(2), ids(3, 1), mask, placement)


def test_ratios_by_level() -> None:
    student, sampler = double(-1, -1, -1, -1), double(-2, -0.5, NAN, -3)
    everything = torch.tensor([True] * 4)
    token = importance_ratios(student, sampler, ids(3, 1), everything, "token")
    torch.testing.assert_close(token.log(), double(1, -0.5, 0, 2))  # text that no sampler drew has ratio 1
    prefix = importance_ratios(student, sampler, ids(3, 1), everything, "prefix")
    torch.testing.assert_close(prefix.log(), double(1, 0.5, 0.5, 2))
    sequence = importance_ratios(student, sampler, ids(3, 1), everything, "sequence")
    torch.testing.assert_close(sequence.log(), double(0.5, 0.5, 0.5, 2))
    second_masked = importance_ratios(student, sampler, ids(3, 1), torch.tensor([True, False, True, True]), "sequence")
    torch.testing.assert_close(second_masked.log(), double(1, 1, 1, 2))


def test_bounds_on_ratios() -> None:
    ratios = double(0.1, 1, 3, 9)
    assert truncate_ratios(ratios, 2.0).tolist() == [0.1, 1, 2, 2]
    assert mask_ratios(ratios, 0.5, 5.0).tolist() == [0, 1, 3, 0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.5, 1.0, 0.0), (1.5, -1.0, 1.5), (0.5, 1.0, -0.5), (0.5, -1.0, 0.0), (1.1, 2.0, -2.2)],
)
def test_ppo_clips_only_what_has_gone_far_enough(ratio: float, advantage: float, slope: float) -> None:
    student = double(-1).requires_grad_()
    clipped_surrogate(student, double(ratio), double(advantage), 0.2, 0.2).sum().backward()
    assert student.grad is not None and float(student.grad) == pytest.approx(slope)


def test_effective_sample_size_counts_the_tokens_that_matter() -> None:
    everything = torch.tensor([True] * 4)
    even, one = double(2, 2, 2, 2), double(1e6, 1e-6, 1e-6, 1e-6)
    assert float(ratio_metrics(even, even, everything)["ratio/ess"]) == pytest.approx(1.0)
    assert float(ratio_metrics(one, one, everything)["ratio/ess"]) == pytest.approx(0.25)


def test_whitening() -> None:
    mask = torch.tensor([True, True, True, False])
    white = whiten(double(1, 2, 6, NAN), mask)
    torch.testing.assert_close(white, double(-2, -1, 3, 0) / math.sqrt(14 / 3))
    assert whiten(double(1, 2, 6, NAN), mask, "mean").tolist() == [-2, -1, 3, 0]
    assert whiten(double(0.1, 0.1, 0.1, 7), mask).abs().max() < 1e-12  # no spread: nothing is blown up
    whole, parts = double(1, 2, 6, 0), (slice(0, 1), slice(1, 4))
    together = torch.stack([moments(whole[part], mask[part]) for part in parts]).sum(0)
    torch.testing.assert_close(whiten(whole[:1], mask[:1], batch_moments=together), white[:1])


# --- closed forms over the vocabulary ---


def test_expected_rewards_and_best_baseline_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher, reference = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    student[0, 2] = teacher[0, 2] = -math.inf  # a token neither can emit
    p = student.softmax(-1)
    beyond = {"reference_logits": reference, "extrapolation": 1.5}
    reward = 1.5 * (teacher.log_softmax(-1) - reference.log_softmax(-1)) - (p.log() - reference.log_softmax(-1))
    reward = torch.where(p > 0, reward, 0.0)
    torch.testing.assert_close(expected_rewards(student, teacher, **beyond), (p * reward).sum(-1))
    length = (torch.eye(6, dtype=torch.float64)[None] - p[:, None]).square().sum(-1)  # [4, 6] |onehot(y) - p|²
    best = (p * length * reward).sum(-1) / (p * length).sum(-1)
    torch.testing.assert_close(least_variance_baseline(student, teacher, **beyond), best)


def test_a_certain_student_has_a_baseline_of_zero() -> None:
    certain = torch.tensor([[1e4, 0.0, 0.0]])
    assert least_variance_baseline(certain, torch.zeros(1, 3)).tolist() == [0.0]


# --- sums within sequences ---


@given(lengths=LENGTHS, discount=st.sampled_from([0.0, 0.3, 0.99, 1.0]))
@settings(deadline=None)
def test_sums_within_sequences_against_loops(lengths: tuple[int, ...], discount: float) -> None:
    values = torch.randn(sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(len(lengths)))
    future = values.flip(0)
    suffix, prefix, credited, start = [], [], [], 0
    for length in lengths:
        rows = range(start, start + length)
        for t in rows:
            suffix.append(sum(discount ** (k - t) * float(values[k]) for k in rows if k >= t))
            prefix.append(sum(float(values[k]) for k in rows if k <= t))
            later = sum(discount ** (k - t) * float(future[k]) for k in rows if k > t)
            credited.append(float(values[t]) + later)
        start += length
    torch.testing.assert_close(suffix_sums(values, ids(*lengths), discount), double(*suffix))
    torch.testing.assert_close(prefix_sums(values, ids(*lengths)), double(*prefix))
    torch.testing.assert_close(returns_to_go(values, ids(*lengths), discount, future), double(*credited))


# --- the same batch, cut differently ---


def extras(arguments: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    generator, n = torch.Generator().manual_seed(seed), len(arguments["mask"])
    control, task = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    count = int(arguments["sequence_ids"][-1]) + 1
    return {"control_variate": control.double(), "task_rewards": task.double()[:count]}


def part_of(arguments: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Sequences first..last-1 as a batch of their own."""
    here = (arguments["sequence_ids"] >= first) & (arguments["sequence_ids"] < last)
    per_token = {name: value[here] for name, value in arguments.items() if name != "task_rewards"}
    per_token["sequence_ids"] = per_token["sequence_ids"] - first
    if "task_rewards" in arguments:
        per_token["task_rewards"] = arguments["task_rewards"][first:last]
    return per_token


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(lengths=LENGTHS.filter(lambda x: len(x) > 1), cut=st.integers(0, 10), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_micro_batches_add_up(variant: dict[str, Any], lengths: tuple[int, ...], cut: int, seed: int) -> None:
    options = EstimatorOptions(**variant)
    arguments = batch(lengths, seed)
    if options.place == "reward":
        arguments |= extras(arguments, seed)
    cut = 1 + cut % (len(lengths) - 1)
    parts = [part_of(arguments, 0, cut), part_of(arguments, cut, len(lengths))]
    denominator = sum(batch_count(part["sequence_ids"], part["mask"], options.normalisation) for part in parts)
    denominator = torch.as_tensor(denominator).clamp(min=1)
    shared: dict[str, Any] = {"options": options, "denominator": denominator}
    if options.whitening != "none":
        shared["batch_moments"] = sum(moments(unwhitened(part, options), part["mask"]) for part in parts)
    loss, gradient, _ = loss_and_gradient(arguments, options=options)
    results = [loss_and_gradient(part, **shared) for part in parts]
    torch.testing.assert_close(results[0][0] + results[1][0], loss)
    torch.testing.assert_close(torch.cat((results[0][1], results[1][1])), gradient)


def unwhitened(part: dict[str, Tensor], options: EstimatorOptions) -> Tensor:
    plain = EstimatorOptions(**(vars(options) | {"whitening": "none"}))
    return token_advantages(
        part["student_logprobs"],
        part["teacher_logprobs"],
        part["sequence_ids"],
        part["mask"],
        plain,
        control_variate=part["control_variate"],
        task_rewards=part["task_rewards"],
    )


NORMALISATIONS: tuple[Normalisation, ...] = ("token", "sequence")
WORKERS_LENGTHS = (3, 1, 5, 2, 4)


def linear_student(weight: Tensor, arguments: dict[str, Tensor]) -> dict[str, Any]:
    """A student with shared parameters [4]: its log-probs are features of each token times the weight."""
    n = len(arguments["mask"])
    features = torch.sin(arguments["teacher_logprobs"][:, None] * torch.arange(1, 5) + torch.zeros(n, 1))
    return arguments | {"student_logprobs": arguments["student_logprobs"] + features @ weight}


def summed_gradient(first: int, last: int, normalisation: Normalisation, world_size: int) -> list[float]:
    """Gradient by the shared weight from sequences first..last-1, summed over processes where there are several."""
    weight = torch.full((4,), 0.1, dtype=torch.float64, requires_grad=True)
    mine = part_of(batch(WORKERS_LENGTHS, 3), first, last)
    denominator = batch_count(mine["sequence_ids"], mine["mask"], normalisation)
    if world_size > 1:
        dist.all_reduce(denominator)
    loss, _ = policy_gradient(**linear_student(weight, mine), normalisation=normalisation, denominator=denominator)
    (gradient,) = torch.autograd.grad(loss, weight)
    if world_size > 1:
        dist.all_reduce(gradient)
    return [float(value) for value in gradient]


def worker(rank: int, port: int, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    first, last = ((0, 2), (2, 5))[rank]
    results.put([summed_gradient(first, last, how, 2) for how in NORMALISATIONS])
    dist.destroy_process_group()


def test_two_processes_give_the_gradient_of_one_batch() -> None:
    """Two real processes with unlike shares of the batch; averaging their own means would give another gradient."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(worker, args=(port, results), nprocs=2)
    for gradients in (results.get(), results.get()):
        for how, gradient in zip(NORMALISATIONS, gradients, strict=True):
            whole = double(*summed_gradient(0, 5, how, 1))
            torch.testing.assert_close(double(*gradient), whole)
            averaged = (double(*summed_gradient(0, 2, how, 1)) + double(*summed_gradient(2, 5, how, 1))) / 2
            assert (averaged - whole).norm() > 1e-3 * whole.norm()


# --- masks, short completions, extreme numbers ---


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_masked_tokens_do_not_exist(variant: dict[str, Any], lengths: tuple[int, ...], seed: int) -> None:
    """Whatever they hold. (With a discount strictly between 0 and 1 they still count as time passed.)"""
    arguments = batch(lengths, seed)
    mask = arguments["mask"]
    if "place" not in variant:
        arguments["control_variate"] = arguments["teacher_logprobs"] / 2
    removed = {name: value[mask] for name, value in arguments.items()}
    poisoned = {name: torch.where(mask, value, NAN) for name, value in arguments.items() if value.is_floating_point()}
    loss, gradient, metrics = loss_and_gradient(arguments | poisoned, **variant)
    assert float(gradient[~mask].abs().sum()) == 0
    assert all(bool(value.isfinite()) for value in metrics.values())
    if mask.any():
        expected_loss, expected_gradient, expected_metrics = loss_and_gradient(removed, **variant)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradient[mask], expected_gradient)
        torch.testing.assert_close(metrics, expected_metrics)
    else:
        assert float(loss) == 0


def test_advantages_ignore_masked_tokens() -> None:
    """Called on its own (for a batch's moments) too: what is masked earns nothing and is credited to nobody."""
    mask, sequence_ids = torch.tensor([True, False, True]), ids(3)
    values = [torch.where(mask, value, NAN) for value in (double(-1, 0, -2), double(-3, 0, -1), double(0.5, 0, 4))]
    student, teacher, expected = values
    options = EstimatorOptions(discount=1.0)
    advantages = token_advantages(student, teacher, sequence_ids, mask, options)
    assert advantages[mask].tolist() == [-2 + 1, 1]
    options = EstimatorOptions(discount=1.0, expected_future=True)
    advantages = token_advantages(student, teacher, sequence_ids, mask, options, expected_rewards=expected)
    assert advantages[mask].tolist() == [-2 + 4, 1]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_to_learn_from(variant: dict[str, Any]) -> None:
    """A process whose share is all masked, or empty, still has a backward pass, of zeros."""
    arguments = batch((2, 3))
    nothing = arguments | {"mask": torch.zeros(5, dtype=torch.bool)}
    loss, gradient, _ = loss_and_gradient(nothing, **variant)
    assert float(loss) == 0 and gradient.tolist() == [0] * 5
    empty = {name: value[:0] for name, value in arguments.items()}
    loss, gradient, _ = loss_and_gradient(empty, **variant)
    assert float(loss) == 0 and gradient.tolist() == []


@given(count=st.integers(1, 8), seed=st.integers(0, 99))
@settings(deadline=None)
def test_single_token_completions_have_no_future_and_no_prefix(count: int, seed: int) -> None:
    arguments = batch((1,) * count, seed)
    expected = loss_and_gradient(arguments)[1]
    assert float(expected.abs().sum()) > 0 or not arguments["mask"].any()
    for name, value in (("discount", 1.0), ("ratio_level", "prefix"), ("ratio_level", "sequence")):
        torch.testing.assert_close(loss_and_gradient(arguments, **{name: value})[1], expected)
    for options in ({"normalisation": "sequence"}, {"normalisation": "sequence", "discount": 0.5}):
        torch.testing.assert_close(loss_and_gradient(arguments, **options)[1], expected)


@given(student=st.floats(-1e4, 0), sampler=st.floats(-1e4, 0), teacher=st.floats(-1e4, 0))
@settings(deadline=None)
@pytest.mark.parametrize("options", [
    {},
    {"correction": "mask", "ratio_level": "sequence", "discount": 1.0},
    {"correction": "clip", "whitening": "mean_std"},
    {"estimate": "k2", "place": "loss"},
    {"estimate": "k3", "place": "loss", "reward_clip": 10.0},
    {"estimate": "k3", "place": "reward", "reward_clip": 10.0},
], ids=str)  # fmt: skip
def test_extreme_logprobs_stay_finite(options: dict[str, Any], student: float, sampler: float, teacher: float) -> None:
    arguments = {
        "student_logprobs": torch.tensor([student, -1.0, student]),
        "sampler_logprobs": torch.tensor([sampler, NAN, -2.0]),
        "teacher_logprobs": torch.tensor([teacher, teacher, -3.0]),
        "sequence_ids": ids(2, 1),
        "mask": torch.ones(3, dtype=torch.bool),
    }
    loss, gradient, _ = loss_and_gradient(arguments, **options)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_clipped_estimates_have_no_gradient_beyond_the_clip() -> None:
    arguments = batch((4,)) | {"mask": torch.ones(4, dtype=torch.bool)}
    arguments["teacher_logprobs"] = arguments["student_logprobs"] + double(0.5, -0.5, 3, -3)
    gradient = loss_and_gradient(arguments, estimate="k2", place="loss", reward_clip=1.0, correction="none")[1]
    torch.testing.assert_close(gradient, double(-0.5, 0.5, 0, 0) / 4)


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimate": "k4"}, "estimate must be one of k1, k2, k3"),
        ({"discount": 1.1}, "discount must be in"),
        ({"place": "loss", "discount": 1.0}, "discount need place: reward"),
        ({"place": "ratio", "correction": "clip"}, "use truncate, mask or none"),
        ({"estimate": "k3", "extrapolation": 1.5}, "set estimate: k1"),
        ({"reward_clip": 0.0}, "reward_clip must be positive"),
        ({"ratio_range": (5.0, 0.5)}, "low < high"),
        ({"clip_range": (1.5, 0.2)}, "clip_range"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EstimatorOptions(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_logprobs": double(-1, -2)}, "flatten completions"),
        ({"mask": torch.ones(5)}, "mask must be bool"),
        ({"sequence_ids": torch.tensor([0, 0, 1, 1, 0])}, "must not decrease"),
        ({"expected_future": True}, "needs expected_rewards"),
        ({"extrapolation": 2.0}, "needs reference_logprobs"),
        ({"estimate": "k2", "place": "loss", "task_rewards": double(1, 2)}, "need place: reward"),
    ],
)
def test_bad_batches_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_gradient(**(batch((2, 3)) | change))
