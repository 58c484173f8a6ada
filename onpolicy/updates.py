"""The two updates: what one batch of scored rollouts contributes to the loss.

An update is a function of tensors. Engines, files and the order of things are the trainer's business.

Shape legend: N completion tokens of the batch, B its rollouts, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from onpolicy.batching import Batch
from onpolicy.config import GKDConfig, PolicyGradientConfig, TrainConfig
from onpolicy.losses import chunked, chunked_logprobs
from onpolicy.losses.estimators import EstimatorOptions, policy_gradient
from onpolicy.losses.normalise import Normalisation
from onpolicy.teachers import Score


@dataclass(frozen=True)
class BatchLoss:
    """What an update says of one batch."""

    loss: torch.Tensor  # scalar with gradient: this batch's share of the whole update's loss
    student_logprobs: torch.Tensor  # [N] float32 detached, the trainer's, at the loss temperature
    teacher_logprobs: torch.Tensor  # [N] float32 detached
    metrics: dict[str, torch.Tensor]  # per token [N], or scalars that are means over the batch's tokens
    entropy: torch.Tensor | None = None  # [N] float32, the student's at the loss temperature, where it is computed


Update = Callable[[Batch, torch.Tensor, torch.Tensor, Score, float], BatchLoss]
"""(batch, student hidden [N, D], student head [V, D], score, denominator) -> BatchLoss"""


def loss_temperature(sampling_temperature: float) -> float:
    """Greedy samples are still compared at temperature 1: at 0 there is no distribution left to learn from."""
    return sampling_temperature or 1.0


def make_update(config: TrainConfig) -> Update:
    """The on-policy phase's update. ValueError when its settings contradict the sampling."""
    temperature = loss_temperature(config.sampling.temperature)
    if config.algorithm == "gkd":
        return _from_gkd_config(config.gkd, temperature, config.optim.normalize)
    if config.sampling.temperature == 0:
        raise ValueError(
            "policy_gradient needs samples of the policy it improves; greedy ones are not: "
            "set sampling.temperature above 0, or algorithm: gkd"
        )
    return policy_gradient_update(config.policy_gradient, temperature, config.optim.normalize)


def _from_gkd_config(config: GKDConfig, temperature: float, normalize: Normalisation) -> Update:
    options = dict(config.options)
    if config.divergence == "jsd":
        options["beta"] = config.beta
    return divergence_update(config.divergence, temperature, normalize, options)


def divergence_update(
    name: str, temperature: float, normalize: Normalisation = "token", options: dict[str, Any] | None = None
) -> Update:
    """Full-vocabulary divergence at every prefix. No gradient flows through how the prefixes were sampled (GKD)."""

    def update(batch: Batch, hidden: torch.Tensor, head: torch.Tensor, score: Score, denominator: float) -> BatchLoss:
        loss, metrics = chunked(
            name, hidden, head, score.hidden, score.head,
            token_ids=batch.token_ids, weights=token_weights(batch.sequence_ids, normalize),
            temperature=temperature, denominator=denominator, **(options or {}),
        )  # fmt: skip
        return BatchLoss(
            loss, metrics["student_logprobs"], metrics["teacher_logprobs"], {"divergence": metrics["per_token"]},
            metrics["student_entropy"],
        )  # fmt: skip

    return update


def policy_gradient_update(config: PolicyGradientConfig, temperature: float, normalize: Normalisation) -> Update:
    """Reward log pi_T - log pi_S of each sampled token, corrected for sampler and trainer being different engines."""
    fields = asdict(config)
    control_variate = fields.pop("control_variate")
    options = EstimatorOptions(**fields, normalisation=normalize)

    def update(batch: Batch, hidden: torch.Tensor, head: torch.Tensor, score: Score, denominator: float) -> BatchLoss:
        student = chunked_logprobs(hidden, head, batch.token_ids, temperature=temperature)
        teacher = score.logprobs(batch.token_ids, temperature)
        whole = _whole_vocabulary(hidden, head, score, temperature) if control_variate else {}
        expected = -whole["per_token"] if control_variate else None
        everything = torch.ones_like(batch.token_ids, dtype=torch.bool)
        loss, metrics = policy_gradient(
            student, batch.sampler_logprobs, teacher, batch.sequence_ids, everything,
            options=options, control_variate=expected, denominator=denominator,
        )  # fmt: skip
        per_token = -expected if expected is not None else student.detach() - teacher
        return BatchLoss(
            loss, student.detach(), teacher, metrics | {"divergence": per_token}, whole.get("student_entropy")
        )

    return update


@torch.no_grad()
def _whole_vocabulary(
    hidden: torch.Tensor, head: torch.Tensor, score: Score, temperature: float
) -> dict[str, torch.Tensor]:
    """``per_token`` reverse KL and ``student_entropy``, [N]."""
    return chunked("reverse_kl", hidden.detach(), head.detach(), score.hidden, score.head, temperature=temperature)[1]


def token_weights(sequence_ids: torch.Tensor, normalize: Normalisation) -> torch.Tensor | None:
    """[N] weight of each token: None for all the same, or 1/length of its completion."""
    if normalize == "token":
        return None
    return 1.0 / torch.bincount(sequence_ids)[sequence_ids].float()


def loss_share(batch: Batch, normalize: Normalisation) -> int:
    """How much a batch adds to the update's denominator: its tokens, or its completions."""
    return len(batch.token_ids) if normalize == "token" else len(batch.indices)
