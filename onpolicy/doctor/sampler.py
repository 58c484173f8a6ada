"""Does the engine sample the policy that is trained: same weights, same temperature, before and after a sync?

Shape legend: N completion tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from onpolicy.batching import pack
from onpolicy.config import BatchingConfig
from onpolicy.doctor.findings import Finding
from onpolicy.models import head_weight, read_causal_lm
from onpolicy.student import Student
from onpolicy.types import Rollout, SamplingParams
from onpolicy.updates import loss_temperature
from spec.sampling import processed_logprobs

PROBE_TEMPERATURE = 0.7
_ROWS = 64  # of the vocabulary looked at together
_SURPRISE_BOUND = 6.0  # standard deviations
_UNUSED_MASS = 1e-3
ROUNDING = 2.0  # times the rounding floor, which another engine may be off by


@dataclass(frozen=True)
class Comparison:
    """Trainer and sampler on the sampler's own tokens, [N] each, nats."""

    trainer: torch.Tensor  # log-prob of the processed distribution
    unprocessed: torch.Tensor  # the same at temperature 1 and unfiltered
    sampler: torch.Tensor
    entropy: torch.Tensor  # of the trainer's processed distribution
    variance: torch.Tensor  # of -log p under it

    @property
    def difference(self) -> float:
        """Mean |trainer - sampler|; tokens that only one side has cut off by top-p are left out."""
        return mean_finite((self.trainer - self.sampler).abs())

    @property
    def difference_unprocessed(self) -> float:
        return mean_finite((self.unprocessed - self.sampler).abs())

    @property
    def surprise(self) -> float:
        """Standard deviations by which the drawn tokens' -log p exceeds the entropy (0 in expectation)."""
        kept = self.trainer.isfinite()
        excess = (-self.trainer - self.entropy)[kept].double().sum()
        return float(excess / self.variance[kept].double().sum().sqrt().clamp_min(1e-6))


def mean_finite(values: torch.Tensor) -> float:
    kept = values[values.isfinite()]
    return float(kept.double().mean()) if len(kept) else float("inf")


@torch.no_grad()
def compare(
    student: Student, rollouts: Sequence[Rollout], params: SamplingParams, batching: BatchingConfig
) -> Comparison:
    """What the trainer says of the tokens a sampler drew with ``params``."""
    temperature = loss_temperature(params.temperature)
    top_k, top_p = (params.top_k, params.top_p) if params.temperature else (0, 1.0)  # greedy: the model's own
    columns: list[list[torch.Tensor]] = []
    for batch in pack(rollouts, batching.token_budget, share_prompts=batching.share_prompts):
        batch = batch.to(student.device)
        hidden, head = student(batch)
        head = head.to(hidden.dtype)
        for rows, ids, drawn in zip(
            hidden.split(_ROWS), batch.token_ids.split(_ROWS), batch.sampler_logprobs.split(_ROWS), strict=True
        ):
            logits = (rows @ head.T).float()
            logprobs = processed_logprobs(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            entropy, variance = _moments(logprobs)
            own, plain = (x.gather(1, ids[:, None])[:, 0] for x in (logprobs, logits.log_softmax(-1)))
            columns.append([own, plain, drawn, entropy, variance])
    return Comparison(*(torch.cat(parts).cpu() for parts in zip(*columns, strict=True)))


def _moments(logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of -log p under p: [n, V] -> [n], [n]."""
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    probs = logprobs.exp()
    entropy = -(probs * finite).sum(-1)
    return entropy, ((probs * finite.square()).sum(-1) - entropy.square()).clamp_min(0.0)


class Reference:
    """The student's arithmetic without rounding, to tell rounding from other weights.

    Args:
        checkpoint: the student as saved; ValueError where it cannot be loaded.
        dtype: the sampler's, in which it holds the weights.
    """

    def __init__(self, student: Student, checkpoint: Path, dtype: str):
        self._dtype: torch.dtype = getattr(torch, dtype)
        model = read_causal_lm(str(checkpoint), torch.float32, student.device).model
        self._exact = Student(model, precision=torch.float32, used=student.used)
        self._rounded = Student(model, precision=self._dtype, used=student.used)
        self.follow(student)

    def follow(self, student: Student) -> None:
        """Take the student's weights as they are now, rounded as the sampler holds them."""
        rounded = {name: tensor.to(self._dtype).float() for name, tensor in student.weights()}
        self._exact.model.load_state_dict(rounded, strict=False)

    def floor(
        self, compared: Comparison, rollouts: Sequence[Rollout], params: SamplingParams, batching: BatchingConfig
    ) -> float:
        """Mean nats by which the trainer, or any forward pass in the sampler's precision, is off by rounding."""
        exact = compare(self._exact, rollouts, params, batching).trainer
        rounded = compare(self._rounded, rollouts, params, batching).trainer
        return max(mean_finite((other - exact).abs()) for other in (compared.trainer, rounded))


def compare_with_floor(
    student: Student, reference: Reference, rollouts: Sequence[Rollout], params: SamplingParams,
    batching: BatchingConfig,
) -> tuple[Comparison, float]:  # fmt: skip
    """Sampler against trainer, and how far rounding alone may take them from one another."""
    compared = compare(student, rollouts, params, batching)
    return compared, reference.floor(compared, rollouts, params, batching)


def weights_agree(compared: Comparison, floor: float, bound: float, engine: str, warm_start: bool) -> Finding:
    """Log-probs of the sampler's own tokens, as the run will draw them, against the trainer's.

    Args:
        floor: their difference by rounding alone. bound: rollouts.parity_bound.
        warm_start: whether the student is trained before it samples.
    """
    name, difference = "sampler and trainer", compared.difference
    found = f"{engine}: log-probs of its {len(compared.trainer)} tokens differ by {difference:.2g} nats on average"
    if difference <= bound:
        return Finding("ok", name, f"{found}, {floor:.2g} by rounding alone (rollouts.parity_bound {bound})")
    if difference <= ROUNDING * floor:
        return Finding(
            "note" if warm_start else "warning", name,
            f"{found}, more than rollouts.parity_bound {bound}; {floor:.2g} by rounding alone, which a "
            "student that was never trained magnifies",
            "none, where the warm start mends it before the first comparison" if warm_start else
            "the run would stop at its first step",
            "" if warm_start else "set warm_start.num_prompts, student.precision and rollouts.dtype: float32, or "
            f"rollouts.parity_bound above {ROUNDING * floor:.2f}",
        )  # fmt: skip
    return Finding(
        "error", name, f"{found}, more than rollouts.parity_bound {bound}; {floor:.2g} by rounding alone",
        "rollouts come from another policy than the one that is trained; the run would stop at its first step",
        "try --rollouts.engine transformers: if the difference goes away, the engine is at fault",
    )  # fmt: skip


def temperature_applied(compared: Comparison, floor: float, bound: float) -> Finding:
    """At ``PROBE_TEMPERATURE``: are the sampler's log-probs, and its tokens, those of the processed distribution?"""
    name, z, allowed = "temperature", compared.surprise, max(bound, ROUNDING * floor)
    found = (
        f"at T={PROBE_TEMPERATURE} log-probs are {compared.difference:.2g} nats from the trainer's processed ones "
        f"({floor:.2g} by rounding); drawn tokens are {z:+.1f} standard deviations from their entropy"
    )
    if compared.difference > allowed:
        ignored = compared.difference_unprocessed <= allowed
        return Finding(
            "error", name, found + ("; the sampler reports them at T=1" if ignored else ""),
            "importance ratios and rewards are wrong on every token, without any sign in the loss",
            "have the engine report processed log-probs, use --rollouts.engine transformers, or sample at T=1",
        )  # fmt: skip
    if abs(z) > _SURPRISE_BOUND:
        return Finding(
            "error", name, found + ": its tokens are not drawn at that temperature",
            "rollouts from a distribution nobody chose, with log-probs that look right (cf. vllm#55005)",
            "use --rollouts.engine transformers, or a version of the engine this project is tested with",
        )  # fmt: skip
    return Finding("ok", name, found)


@torch.no_grad()
def unused_rows(student: Student, texts: Sequence[Rollout], batching: BatchingConfig) -> Finding | None:
    """Probability the student gives to ids that no token has; None where it has no such rows."""
    batch = pack(texts[:2], batching.token_budget, share_prompts=False)[0].to(student.device)
    head = head_weight(student.model)
    if student.used is None or len(head) <= student.used:
        return None
    hidden, _ = student(batch)
    probabilities = (hidden[:_ROWS] @ head.to(hidden.dtype).T).float().softmax(-1)
    mass = float(probabilities[:, student.used :].sum(-1).mean())
    unused = len(head) - student.used
    found = f"{unused} of the student's rows have no token and would get {mass:.2g} of the probability; training "
    found += "leaves them out"
    if mass < _UNUSED_MASS:
        return Finding("ok", "padded rows", found)
    return Finding(
        "warning", "padded rows", found,
        "an engine that serves the saved student and does not leave them out may draw ids that are no text",
        "cut the student's embedding to the tokenizer (resize_token_embeddings), or make the padding's rows unlikely",
    )  # fmt: skip
