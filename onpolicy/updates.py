"""The two updates: what one batch of scored rollouts contributes to the loss.

An update is a function of tensors. Engines, files and the order of things are the trainer's business.

Shape legend: N completion tokens of the batch, B its rollouts, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from onpolicy.batching import Batch
from onpolicy.config import GKDConfig, PolicyGradientConfig, TrainConfig
from onpolicy.losses import chunked, chunked_logprobs, chunked_reduce
from onpolicy.losses._checks import checked_options
from onpolicy.losses.advantages import moments
from onpolicy.losses.estimators import EstimatorOptions, policy_gradient, token_advantages
from onpolicy.losses.normalise import Normalisation
from onpolicy.losses.rewards import vocabulary_sums
from onpolicy.teachers import Score, Verdict


@dataclass(frozen=True)
class BatchLoss:
    """What an update says of one batch."""

    loss: torch.Tensor  # scalar with gradient: this batch's share of the whole update's loss
    student_logprobs: torch.Tensor  # [N] float32 detached, the trainer's, at the loss temperature
    teacher_logprobs: torch.Tensor  # [N] float32 detached
    metrics: dict[str, torch.Tensor]  # per token [N], or scalars that are means over the batch's tokens
    entropy: torch.Tensor | None = None  # [N] float32, the student's at the loss temperature, where it is computed


Update = Callable[[Batch, torch.Tensor, torch.Tensor, Verdict, float, torch.Tensor | None], BatchLoss]
"""(batch, student hidden [N, D], student head [V, D], verdict, denominator, head_grad [V, D] or None) -> BatchLoss

``head_grad`` is where the head's gradient is added, see :func:`onpolicy.losses.chunked`; the loss is backpropagated as
it is.
"""


def loss_temperature(sampling_temperature: float) -> float:
    """Greedy samples are still compared at temperature 1: at 0 there is no distribution left to learn from."""
    return sampling_temperature or 1.0


def make_update(config: TrainConfig) -> Update:
    """The on-policy phase's update. ValueError when its settings contradict each other or the sampling."""
    temperature = loss_temperature(config.sampling.temperature)
    if config.algorithm == "gkd":
        return _from_gkd_config(config.gkd, temperature, config.optim.normalize)
    if config.sampling.temperature == 0:
        raise ValueError(
            "policy_gradient needs samples of the policy it improves; greedy ones are not: "
            "set sampling.temperature above 0, or algorithm: gkd"
        )
    return PolicyGradientUpdate(config.policy_gradient, temperature, config.optim.normalize)


def _from_gkd_config(config: GKDConfig, temperature: float, normalize: Normalisation) -> Update:
    options = dict(config.options)
    if "beta" in options:
        raise ValueError(f"gkd.options has beta: {options['beta']}; set it as gkd.beta, where the run looks for it")
    if config.divergence == "jsd":
        options["beta"] = config.beta
    elif config.beta != GKDConfig().beta:
        raise ValueError(
            f"gkd.beta: {config.beta} has no effect on gkd.divergence: {config.divergence}; leave it out, or choose jsd"
        )
    try:
        return divergence_update(config.divergence, temperature, normalize, options)
    except ValueError as error:
        raise ValueError(f"gkd.options: {error}") from error


def divergence_update(
    name: str, temperature: float, normalize: Normalisation = "token", options: dict[str, Any] | None = None
) -> Update:
    """Full-vocabulary divergence at every prefix. No gradient flows through how the prefixes were sampled (GKD).

    Of several teachers the weighted mean of the divergences from each: for forward KL the same gradient as from the
    teachers' mixture, for reverse KL as from their normalised geometric mean, and defined for every other one.
    ValueError for an unknown divergence, option or value.
    """
    checked = checked_options(name, options or {}, temperature)

    def update(
        batch: Batch,
        hidden: torch.Tensor,
        head: torch.Tensor,
        verdict: Verdict,
        denominator: float,
        head_grad: torch.Tensor | None = None,
    ) -> BatchLoss:
        parts = [
            chunked(
                name, hidden, head, score.hidden, score.head,
                token_ids=batch.token_ids, weights=token_weights(batch.sequence_ids, normalize),
                temperature=temperature, denominator=denominator / share, head_grad=head_grad, **checked,
            )
            for share, score in zip(verdict.weights, verdict.teachers, strict=True)
        ]  # fmt: skip
        metrics = [metrics for _, metrics in parts]
        return BatchLoss(
            torch.stack([loss for loss, _ in parts]).sum(), metrics[0]["student_logprobs"],
            weighted_sum(verdict.weights, [each["teacher_logprobs"] for each in metrics]),
            {"divergence": weighted_sum(verdict.weights, [each["per_token"] for each in metrics])},
            metrics[0]["student_entropy"],
        )  # fmt: skip

    return update


class PolicyGradientUpdate:
    """Reward log pi_T - log pi_S of each sampled token, corrected for sampler and trainer being different engines.

    The reward leads away from the verdict's reference where ``config.extrapolation`` says so, and counts the task's
    where the verdict has one. An :data:`Update`; where :attr:`whitens`, it also takes ``batch_moments`` [3], the sum
    of :meth:`moments` over the batches of the whole update. ValueError for settings that contradict each other.
    """

    def __init__(self, config: PolicyGradientConfig, temperature: float, normalize: Normalisation):
        check_policy_gradient(config)
        fields = asdict(config)
        self.control, _ = fields.pop("control_variate"), fields.pop("reference_model")
        self.options, self.temperature = EstimatorOptions(**fields, normalisation=normalize), temperature

    @property
    def whitens(self) -> bool:
        return self.options.place == "reward" and self.options.whitening != "none"

    def __call__(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        head: torch.Tensor,
        verdict: Verdict,
        denominator: float,
        head_grad: torch.Tensor | None = None,
        batch_moments: torch.Tensor | None = None,
    ) -> BatchLoss:
        ids = batch.token_ids
        student = chunked_logprobs(hidden, head, ids, temperature=self.temperature, head_grad=head_grad)
        teacher, reference = self._voices(batch, verdict)
        whole = self._whole_vocabulary(hidden, head, verdict)
        loss, metrics = policy_gradient(
            student, batch.sampler_logprobs, teacher, batch.sequence_ids, torch.ones_like(ids, dtype=torch.bool),
            options=self.options, control_variate=whole.get("control_variate"), reference_logprobs=reference,
            task_rewards=self._task(verdict), batch_moments=batch_moments, denominator=denominator,
        )  # fmt: skip
        metrics["divergence"] = whole.get("divergence", student.detach() - teacher)
        return BatchLoss(loss, student.detach(), teacher, metrics, whole.get("student_entropy"))

    @torch.no_grad()
    def moments(self, batch: Batch, hidden: torch.Tensor, head: torch.Tensor, verdict: Verdict) -> torch.Tensor:
        """[3] float64: count, sum and sum of squares of the batch's advantages before they are whitened."""
        student = chunked_logprobs(hidden, head, batch.token_ids, temperature=self.temperature)
        teacher, reference = self._voices(batch, verdict)
        mask = torch.ones_like(batch.token_ids, dtype=torch.bool)
        advantages = token_advantages(
            student, teacher, batch.sequence_ids, mask, replace(self.options, whitening="none"),
            control_variate=self._whole_vocabulary(hidden, head, verdict).get("control_variate"),
            reference_logprobs=reference, task_rewards=self._task(verdict),
        )  # fmt: skip
        return moments(advantages, mask)

    def _voices(self, batch: Batch, verdict: Verdict) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log-probs [N] of the teachers together and of the reference."""
        said, reference = verdict.logprobs(batch.token_ids, self.temperature), verdict.reference
        return said, None if reference is None else reference.logprobs(batch.token_ids, self.temperature)

    def _whole_vocabulary(self, hidden: torch.Tensor, head: torch.Tensor, verdict: Verdict) -> dict[str, torch.Tensor]:
        return whole_vocabulary(self.control, hidden, head, verdict, self.options.extrapolation, self.temperature)

    def _task(self, verdict: Verdict) -> torch.Tensor | None:
        return verdict.task_rewards if self.options.task_weight else None


def check_policy_gradient(config: PolicyGradientConfig) -> None:
    """ValueError, with the remedy, for settings that cannot work together."""
    if (config.extrapolation != 1) != (config.reference_model is not None):
        raise ValueError(
            f"policy_gradient.extrapolation is {config.extrapolation} and policy_gradient.reference_model "
            f"{config.reference_model or 'unset'}: rewards are extrapolated from a reference model; set both, or leave "
            "extrapolation at 1 and reference_model unset"
        )
    if config.extrapolation <= 0 or config.task_weight < 0:
        raise ValueError(
            f"policy_gradient.extrapolation must be positive and task_weight at least 0, got {config.extrapolation}, "
            f"{config.task_weight}: the student would be led away from its teacher, or from right answers"
        )
    if config.place != "reward" and (config.control_variate != "none" or config.task_weight):
        raise ValueError(
            f"policy_gradient.place: {config.place} has no reward to subtract from or to add to: set "
            "policy_gradient.control_variate: none and task_weight: 0, or place: reward"
        )
    if config.task_weight and config.task_placement == "last" and config.discount == 0:
        raise ValueError(
            "policy_gradient.task_placement: last with discount: 0 teaches the task to last tokens alone; set "
            "task_placement: sequence, or a discount above 0"
        )


@torch.no_grad()
def whole_vocabulary(
    control: str, hidden: torch.Tensor, head: torch.Tensor, verdict: Verdict, extrapolation: float, temperature: float
) -> dict[str, torch.Tensor]:
    """What sums over the vocabulary say of each position, in bounded memory; {} for the control variate "none".

    ``control_variate``, ``divergence`` (the teachers' mean reverse KL) and ``student_entropy``, [N] nats each. The
    reward is sum_k c_k (log pi_k - log pi_S), c the teachers' weights times the extrapolation and, for the reference,
    1 - extrapolation; both control variates are linear in it.
    """
    if control == "none":
        return {}
    student, scores, shares = (hidden.detach(), head.detach()), list(verdict.teachers), list(verdict.weights)
    if verdict.reference is not None:
        scores.append(verdict.reference)
        shares = [extrapolation * share for share in shares] + [1.0 - extrapolation]
    sums = [_expected_alone(*student, score, temperature) if control == "expected" else
            chunked_reduce(*student, score.hidden, score.head, vocabulary_sums, temperature=temperature)
            for score in scores]  # fmt: skip
    divergences = [-each["expected"] for each in sums[: len(verdict.teachers)]]
    return {
        "control_variate": weighted_sum(shares, [each[control] for each in sums]),
        "divergence": weighted_sum(verdict.weights, divergences),
        "student_entropy": sums[0]["student_entropy"],
    }


def _expected_alone(hidden: torch.Tensor, head: torch.Tensor, score: Score, temperature: float) -> dict[str, Any]:
    """The part of ``vocabulary_sums`` that the fused kernel for reverse KL gives."""
    metrics = chunked("reverse_kl", hidden, head, score.hidden, score.head, temperature=temperature)[1]
    return {"expected": -metrics["per_token"], "student_entropy": metrics["student_entropy"]}


def weighted_sum(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_k weights[k] * values[k]."""
    return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)


def token_weights(sequence_ids: torch.Tensor, normalize: Normalisation) -> torch.Tensor | None:
    """[N] weight of each token: None for all the same, or 1/length of its completion."""
    if normalize == "token":
        return None
    return 1.0 / torch.bincount(sequence_ids)[sequence_ids].float()


def loss_share(batch: Batch, normalize: Normalisation) -> int:
    """How much a batch adds to the update's denominator: its tokens, or its completions."""
    return len(batch.token_ids) if normalize == "token" else len(batch.indices)
