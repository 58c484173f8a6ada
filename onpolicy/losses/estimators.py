"""Policy-gradient losses from sampled tokens: one function, whose options are the estimators of the field.

What each choice really descends, with its bias and variance, is proved by enumeration and printed by
``python -m onpolicy.losses`` (docs/estimators.md). The defaults are the common, vetted setting: k1 in reward, a
per-token advantage, truncated token-level importance ratio, normalised by token.

Shapes: N completion tokens of a flat batch, B sequences; log-probs in nats, of the tokens in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from onpolicy.losses.advantages import TaskPlacement, Whitening, returns_to_go, task_credit, whiten
from onpolicy.losses.importance import (
    Correction,
    RatioLevel,
    clipped_surrogate,
    importance_ratios,
    mask_ratios,
    ratio_metrics,
    truncate_ratios,
)
from onpolicy.losses.normalise import Normalisation, normalised_sum
from onpolicy.losses.rewards import KL_ESTIMATES, k1, k3, token_rewards

Estimate = Literal["k1", "k2", "k3"]
Place = Literal["reward", "loss", "ratio"]


@dataclass(frozen=True)
class EstimatorOptions:
    """Which estimator. Each field's bias and variance: docs/estimators.md."""

    estimate: Estimate = "k1"  # of KL(student‖teacher), from one sampled token
    place: Place = "reward"  # "reward": a constant times log-prob; "loss": differentiated itself; "ratio": both
    discount: float = 0.0  # of later tokens' rewards; 0 is a per-token advantage, 1 the sequences' KL
    expected_future: bool = False  # later tokens' rewards in closed form (needs expected_rewards)
    extrapolation: float = 1.0  # beyond the teacher, away from a reference model (needs reference_logprobs)
    reward_clip: float | None = None  # bound on |log T - log S|, nats
    task_placement: TaskPlacement = "sequence"  # which tokens a task reward credits
    task_weight: float = 1.0  # of the task reward against the teacher's, nats per unit of task reward
    whitening: Whitening = "none"  # of the advantages, over the batch
    correction: Correction = "truncate"  # of sampler ≠ trainer: TIS, IcePop ("mask") or PPO ("clip")
    ratio_level: RatioLevel = "token"  # how much of the sample the ratio covers
    ratio_cap: float = 2.0  # correction "truncate": largest weight
    ratio_range: tuple[float, float] = (0.5, 5.0)  # correction "mask": ratios outside are left out
    clip_range: tuple[float, float] = (0.2, 0.2)  # correction "clip": below and above 1
    normalisation: Normalisation = "token"  # mean over tokens, or over sequences of their means

    def __post_init__(self) -> None:
        choices = {"estimate": Estimate, "place": Place, "correction": Correction, "ratio_level": RatioLevel}
        choices |= {"task_placement": TaskPlacement, "whitening": Whitening, "normalisation": Normalisation}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"discount must be in [0, 1], got {self.discount}")
        if self.reward_clip is not None and self.reward_clip <= 0:
            raise ValueError(f"reward_clip must be positive, or null for no bound, got {self.reward_clip}")
        if self.ratio_cap <= 0 or not 0 <= self.ratio_range[0] < self.ratio_range[1]:
            raise ValueError(f"need ratio_cap > 0 and 0 <= low < high, got {self.ratio_cap} and {self.ratio_range}")
        if not (0 <= self.clip_range[0] <= 1 and self.clip_range[1] >= 0):
            raise ValueError(f"clip_range must be (below in [0, 1], above >= 0), got {self.clip_range}")
        if self.place != "reward":
            self._refuse_reward_options()
        elif self.extrapolation != 1 and self.estimate != "k1":
            raise ValueError("extrapolation is defined for estimate k1; set estimate: k1 or extrapolation: 1")

    def _refuse_reward_options(self) -> None:
        """Options that shape an advantage do nothing where there is none: an error, not silence."""
        defaults = {"discount": 0.0, "expected_future": False, "extrapolation": 1.0, "whitening": "none"}
        changed = [name for name, value in defaults.items() if getattr(self, name) != value]
        if changed:
            raise ValueError(f"{', '.join(changed)} need place: reward (place {self.place} has no advantage)")
        if self.correction == "clip":
            raise ValueError("correction clip needs place: reward; use truncate, mask or none")


def policy_gradient(
    student_logprobs: Tensor,
    sampler_logprobs: Tensor,
    teacher_logprobs: Tensor,
    sequence_ids: Tensor,
    mask: Tensor,
    *,
    options: EstimatorOptions = EstimatorOptions(),
    control_variate: Tensor | None = None,
    expected_rewards: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    task_rewards: Tensor | None = None,
    batch_moments: Tensor | None = None,
    denominator: Tensor | float | None = None,
    **overrides: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A loss whose gradient moves the student towards the teacher on its own samples, and what to log of it.

    student_logprobs [N] with gradient, at the sampling temperature; sampler_logprobs [N], NaN where no sampler drew
    the token; teacher_logprobs [N]; sequence_ids [N] int64, non-decreasing; mask [N] bool, False for tokens to leave
    out (whatever their other values, NaN included). ``overrides`` replace single fields of ``options``.

    control_variate [N]: what is subtracted from the returns, a number that may depend on the prefix but not on the
    token: -KL(S‖T)(h_t) from :func:`~onpolicy.losses.rewards.expected_rewards` (arXiv 2605.07865), or better
    :func:`~onpolicy.losses.rewards.least_variance_baseline`. The gradient stays unbiased. From *rewards* it must not
    be subtracted: with a discount that cancels all credit for later tokens.
    expected_rewards [N]: closed-form rewards of later tokens, for expected_future.
    reference_logprobs [N]: for extrapolation. task_rewards [B]: verifiable reward per sequence.
    batch_moments [3]: :func:`~onpolicy.losses.advantages.moments` of the whole batch's advantages, for whitening.
    denominator: unmasked tokens (normalisation token) or sequences (sequence) of the *whole* batch, all micro-batches
    and processes: losses and gradients then add up (sum, not mean) to those of one big batch; see
    :func:`~onpolicy.losses.normalise.batch_count`. Default: this call's own.

    Returns a scalar loss, 0 with zero gradient where everything is masked, and detached scalars.
    Raises ValueError on mismatched shapes and on options that contradict each other.
    """
    options = replace(options, **overrides) if overrides else options
    tensors = {"student_logprobs": student_logprobs, "sampler_logprobs": sampler_logprobs}
    tensors |= {"teacher_logprobs": teacher_logprobs, "sequence_ids": sequence_ids, "mask": mask}
    optional = {"control_variate": control_variate, "expected_rewards": expected_rewards}
    optional |= {"reference_logprobs": reference_logprobs}
    check_batch(**tensors, **{name: value for name, value in optional.items() if value is not None})

    student, teacher = torch.where(mask, student_logprobs, 0.0), torch.where(mask, teacher_logprobs, 0.0)
    kept = {name: None if value is None else torch.where(mask, value.detach(), 0.0) for name, value in optional.items()}
    ratios = importance_ratios(student, sampler_logprobs, sequence_ids, mask, options.ratio_level)
    weights = corrected_weights(ratios, options)

    if options.place == "reward":
        advantages = token_advantages(
            student,
            teacher,
            sequence_ids,
            mask,
            options,
            task_rewards=task_rewards,
            batch_moments=batch_moments,
            **kept,
        )
        losses = surrogate(student, ratios, weights, advantages, options)
        metrics = {"advantage/mean": masked_mean(advantages, mask)}
        metrics["advantage/abs"] = masked_mean(advantages.abs(), mask)
    elif control_variate is not None or task_rewards is not None:
        raise ValueError(f"control_variate and task_rewards need place: reward, {options.place} has no advantage")
    else:
        losses, metrics = weights * differentiated_estimate(student, teacher, options), {}
    loss = normalised_sum(losses, sequence_ids, mask, options.normalisation, denominator)
    return loss, metrics | kl_metrics(student, teacher, mask) | ratio_metrics(ratios, weights, mask)


def token_advantages(
    student: Tensor,
    teacher: Tensor,
    sequence_ids: Tensor,
    mask: Tensor,
    options: EstimatorOptions,
    *,
    control_variate: Tensor | None = None,
    expected_rewards: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    task_rewards: Tensor | None = None,
    batch_moments: Tensor | None = None,
) -> Tensor:
    """[N] detached: return to go of the teacher's and the task's reward, less its control variate, whitened.

    Arguments as for :func:`policy_gradient`, public because whitening over a whole batch needs the
    :func:`~onpolicy.losses.advantages.moments` of these (with whitening none) summed over all its parts.
    """
    if options.estimate == "k1":
        rewards = token_rewards(
            teacher,
            student,
            reference_logprobs=reference_logprobs,
            extrapolation=options.extrapolation,
            clip=options.reward_clip,
        )
    else:
        rewards = -KL_ESTIMATES[options.estimate](student.detach(), clipped_teacher(student, teacher, options).detach())
    rewards = torch.where(mask, rewards, 0.0)
    task = torch.zeros_like(rewards)
    if task_rewards is not None:
        task = options.task_weight * task_credit(task_rewards, sequence_ids, mask, options.task_placement)
    if options.task_placement == "last":
        rewards, task = rewards + task, torch.zeros_like(task)
    if options.expected_future and expected_rewards is None:
        raise ValueError("expected_future needs expected_rewards: give them, or set expected_future: false")
    future = None
    if options.expected_future and expected_rewards is not None:
        future = torch.where(mask, expected_rewards, 0.0)
    advantages = returns_to_go(rewards, sequence_ids, options.discount, future) + task
    if control_variate is not None:
        advantages = advantages - control_variate
    return whiten(advantages, mask, options.whitening, batch_moments)


def corrected_weights(ratios: Tensor, options: EstimatorOptions) -> Tensor:
    """[N] what each token's loss is weighted with, from its importance ratio."""
    if options.correction == "none":
        return torch.ones_like(ratios)
    if options.correction == "truncate":
        return truncate_ratios(ratios, options.ratio_cap)
    if options.correction == "mask":
        return mask_ratios(ratios, *options.ratio_range)
    return ratios.clamp(1 - options.clip_range[0], 1 + options.clip_range[1])


def surrogate(
    student: Tensor, ratios: Tensor, weights: Tensor, advantages: Tensor, options: EstimatorOptions
) -> Tensor:
    """[N] losses whose gradient is -weight * advantage * ∇log S(y_t)."""
    if options.correction == "clip":
        return clipped_surrogate(student, ratios, advantages, *options.clip_range)
    return -weights * advantages * student


def differentiated_estimate(student: Tensor, teacher: Tensor, options: EstimatorOptions) -> Tensor:
    """[N] k1, k2 or k3 itself, differentiated ("loss"), or times S / stop_gradient(S) ("ratio").

    The ratio is 1 in value; it adds the gradient of the law that drew the token, which "loss" forgets: for k1 and k3
    the whole is then the gradient of reverse KL (for k3: DeepSeek-V3.2, arXiv 2512.02556).
    """
    estimates = KL_ESTIMATES[options.estimate](student, clipped_teacher(student, teacher, options))
    return estimates if options.place == "loss" else (student - student.detach()).exp() * estimates


def clipped_teacher(student: Tensor, teacher: Tensor, options: EstimatorOptions) -> Tensor:
    """[N] teacher's log-probs moved so that |log T - log S| <= reward_clip: a clipped token's estimate is constant."""
    if options.reward_clip is None:
        return teacher.detach()
    return student + (teacher.detach() - student).clamp(-options.reward_clip, options.reward_clip)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Scalar, detached: mean over unmasked tokens, 0 if there are none."""
    return torch.where(mask, values.detach(), 0.0).sum() / mask.sum().clamp(min=1)


def kl_metrics(student: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Sampled values of reverse KL, nats a token: k1 and k3 agree in expectation, so their gap shows the noise."""
    student, teacher = student.detach(), teacher.detach()
    return {"kl/k1": masked_mean(k1(student, teacher), mask), "kl/k3": masked_mean(k3(student, teacher), mask)}


def check_batch(*, student_logprobs: Tensor, sequence_ids: Tensor, mask: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless all are [N], ``mask`` is bool and ``sequence_ids`` int64 and non-decreasing."""
    tensors = {"student_logprobs": student_logprobs, "sequence_ids": sequence_ids, "mask": mask, **others}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if student_logprobs.dim() != 1 or len({tuple(shape) for shape in shapes.values()}) != 1:
        raise ValueError(f"a flat batch wants every tensor of shape [N], got {shapes}; flatten completions end to end")
    if mask.dtype != torch.bool or sequence_ids.dtype != torch.int64:
        raise ValueError(f"mask must be bool and sequence_ids int64, got {mask.dtype} and {sequence_ids.dtype}")
    if bool((sequence_ids.diff() < 0).any()):
        raise ValueError("sequence_ids must not decrease: keep each completion's tokens together")
