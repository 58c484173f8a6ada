"""Per-token rewards: how much better the teacher likes a sampled token than the student does.

S student, T teacher; N tokens of a flat batch, V vocabulary, K teachers; log-probs in nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def k1(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """[N] log S - log T: an unbiased value of KL(S‖T) for tokens drawn from S, of either sign (Schulman 2020)."""
    return student_logprobs - teacher_logprobs


def k2(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """[N] (log T - log S)^2 / 2: never negative; a biased value of KL(S‖T) with its exact gradient (Schulman 2020)."""
    return (teacher_logprobs - student_logprobs).square() / 2


def k3(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """[N] T/S - 1 - log(T/S): never negative and an unbiased value of KL(S‖T) (Schulman 2020).

    T/S overflows where the teacher likes a token exp(88) times better (float32): clip the log-ratio first.
    """
    log_ratio = teacher_logprobs - student_logprobs
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATES = {"k1": k1, "k2": k2, "k3": k3}


def token_rewards(
    teacher_logprobs: Tensor,
    student_logprobs: Tensor,
    *,
    reference_logprobs: Tensor | None = None,
    extrapolation: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """[N] log T - log S, whose expectation over S is -KL(S‖T); no gradient flows through it.

    With a reference model R and an extrapolation λ the reward is λ (log T - log R) - (log S - log R), whose optimum
    is proportional to R (T/R)^λ: λ > 1 goes beyond the teacher (G-OPD, arXiv 2602.12125). λ = 1 needs no reference.
    ``clip`` bounds the reward to [-clip, clip]; what that biases is in docs/estimators.md.

    Raises ValueError if λ != 1 comes without a reference.
    """
    rewards = teacher_logprobs.detach() - student_logprobs.detach()
    if extrapolation != 1.0:
        if reference_logprobs is None:
            raise ValueError(f"extrapolation {extrapolation} needs reference_logprobs; set it to 1 or give a reference")
        rewards = rewards + (extrapolation - 1.0) * (teacher_logprobs - reference_logprobs).detach()
    return rewards if clip is None else rewards.clamp(-clip, clip)


def expected_rewards(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reference_logits: Tensor | None = None,
    extrapolation: float = 1.0,
) -> Tensor:
    """[N] closed-form expectation of :func:`token_rewards` over the student, from logits [N, V]; no gradient.

    Without extrapolation it is -KL(S‖T) at each prefix, the control variate of arXiv 2605.07865. It is linear in the
    rewards: for several teachers take the weighted sum of each one's.
    """
    probabilities, rewards = _law_and_rewards(student_logits, teacher_logits, reference_logits, extrapolation)
    return _mean(probabilities, rewards)


def least_variance_baseline(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    reference_logits: Tensor | None = None,
    extrapolation: float = 1.0,
) -> Tensor:
    """[N] the control variate that leaves the gradient by the logits least variance; no gradient.

    E[|g|² r] / E[|g|²] over the student's next token (Greensmith et al. 2004), where g is the one-hot token minus the
    probabilities π, so |g|² = 1 - 2 π(y) + Σ π². On the student's own samples at discount 0 it never adds variance,
    unlike -KL(S‖T): where the student is sure of itself its rare tokens have the long gradients, and the mean reward
    is not what should be taken off those. Elsewhere it is unbiased still, only not the best.
    A student of one certain token has no gradient: its baseline is 0. Linear in the rewards.
    """
    return _least_variance(*_law_and_rewards(student_logits, teacher_logits, reference_logits, extrapolation))


def vocabulary_sums(student_logprobs: Tensor, teacher_logprobs: Tensor) -> dict[str, Tensor]:
    """Both control variates and the student's entropy from log-probs [n, V] -> [n] each; no gradient.

    ``expected`` is :func:`expected_rewards`, ``least_variance`` :func:`least_variance_baseline`, ``student_entropy``
    in nats. Sums over the vocabulary alone, so :func:`onpolicy.losses.chunked_reduce` makes them from hidden states in
    bounded memory. Linear in the reward: for several teachers and extrapolation add each model's, weighted.
    """
    student = student_logprobs.detach()
    probabilities, rewards = student.exp(), token_rewards(teacher_logprobs, student)
    return {
        "expected": _mean(probabilities, rewards),
        "least_variance": _least_variance(probabilities, rewards),
        "student_entropy": -_mean(probabilities, student),
    }


def _least_variance(probabilities: Tensor, rewards: Tensor) -> Tensor:
    """[N] E[|g|² r] / E[|g|²] with |g|² = 1 - 2 π(y) + Σ π²."""
    square = probabilities.square().sum(-1)
    length = 1 - square  # E|g|²
    weighted = (1 + square) * _mean(probabilities, rewards) - 2 * _mean(probabilities.square(), rewards)
    return torch.where(length > 1e-6, weighted / length.clamp(min=1e-6), 0.0)


def _law_and_rewards(
    student_logits: Tensor, teacher_logits: Tensor, reference_logits: Tensor | None, extrapolation: float
) -> tuple[Tensor, Tensor]:
    """[N, V] the student's probabilities and the reward of every token."""
    student, teacher = student_logits.detach().log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    reference = None if reference_logits is None else reference_logits.detach().log_softmax(-1)
    rewards = token_rewards(teacher, student, reference_logprobs=reference, extrapolation=extrapolation)
    return student.exp(), rewards


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """[N] weighted sum over the vocabulary, in which 0 weight silences even an infinite value: 0 log 0 = 0."""
    return torch.where(weights > 0, weights * values, 0.0).sum(-1)


def combine_teachers(teacher_logprobs: Sequence[Tensor] | Tensor, weights: Sequence[float] | Tensor) -> Tensor:
    """[N] weighted mean of the teachers' log-probs: rewards from it descend sum_k w_k KL(S‖T_k).

    ``teacher_logprobs`` K tensors [N]; ``weights`` [K], or [K, N] to send each prompt to a teacher of its own (a
    teacher of weight 0 may then hold anything, NaN included). Raises ValueError unless weights are >= 0 and sum to 1.
    """
    logprobs = torch.stack(tuple(teacher_logprobs))
    shares = torch.as_tensor(weights, dtype=logprobs.dtype, device=logprobs.device)
    if shares.shape not in (logprobs.shape[:1], logprobs.shape):
        raise ValueError(f"weights must be [K] or [K, N], log-probs being {list(logprobs.shape)}: {list(shares.shape)}")
    total = shares.sum(0)
    if bool((shares < 0).any()) or not torch.allclose(total, torch.ones_like(total), atol=1e-6):
        raise ValueError("teacher weights must be >= 0 and sum to 1 (divide them by their sum)")
    shares = shares.reshape(len(logprobs), -1)
    return torch.where(shares > 0, shares * logprobs, 0.0).sum(0)
