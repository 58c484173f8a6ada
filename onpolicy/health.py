"""Is the student still saying something worth learning from? Figures of a step's rollouts, and warnings.

What goes wrong on-policy shows here first: completions that never end, loops, collapse to one short answer, an
entropy that vanishes, a sampler that drifts from the trainer, a teacher that is followed at the first tokens only.
Every figure is a float under a flat name ``health/...``; shares are in [0, 1], entropies and divergences in nats.

Shape legend: B rollouts of a step, N their completion tokens laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from onpolicy.health_config import HealthConfig
from onpolicy.losses.importance import importance_ratios, ratio_metrics
from onpolicy.repetition import count_ngrams, longest_loop
from onpolicy.types import Rollout

if TYPE_CHECKING:
    from onpolicy.batching import Batch
    from onpolicy.updates import BatchLoss

BUCKET = 8  # completion positions 0-7 make the first bucket; every further one is as long as all before it


@dataclass(frozen=True)
class StepTokens:
    """Per-token figures of a step, on any device, detached."""

    sequence_ids: Tensor  # [N] int64 non-decreasing: the rollout a token belongs to
    student_logprobs: Tensor  # [N] nats, the trainer's
    teacher_logprobs: Tensor  # [N] nats
    sampler_logprobs: Tensor  # [N] nats, NaN where no sampler drew the token
    divergence: Tensor  # [N] nats, of the whole vocabulary where the update computes it
    entropy: Tensor | None = None  # [N] nats, the student's, of the whole vocabulary

    @classmethod
    def of(cls, batch: Batch, result: BatchLoss) -> StepTokens:
        """What an update says of one batch."""
        return cls(
            batch.sequence_ids, result.student_logprobs, result.teacher_logprobs, batch.sampler_logprobs,
            result.metrics["divergence"], result.entropy,
        )  # fmt: skip

    def cpu(self) -> StepTokens:
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: None if value is None else value.cpu() for name, value in columns.items()}
        return StepTokens(**moved)  # type: ignore[arg-type]

    @classmethod
    def join(cls, parts: Sequence[StepTokens]) -> StepTokens:
        """Batches of one step as one; sequences are numbered on."""
        columns: dict[str, Tensor | None] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            columns[field.name] = None if any(value is None for value in values) else torch.cat(values)
        first, ids = 0, []
        for part in parts:
            ids.append(part.sequence_ids + first)
            first = int(ids[-1].max()) + 1 if len(ids[-1]) else first
        return cls(**(columns | {"sequence_ids": torch.cat(ids)}))  # type: ignore[arg-type]


def rollout_health(rollouts: Sequence[Rollout], config: HealthConfig) -> dict[str, float]:
    """Of the completions alone, as drawn: length, truncation, repetition. Empty without any rollout.

    - ``truncated``: share without a stop token; ``one_token``: share of one token, nothing but a stop token mostly;
    - ``length/mean, q10, q50, q90, max``: tokens;
    - ``repeated_ngrams``: share of n-grams that occurred earlier in the same completion;
    - ``loop_share``: tokens in each completion's longest loop, as a share of all tokens; ``loop_max``: tokens of the
      longest loop (:func:`onpolicy.repetition.longest_loop`);
    - ``missing_logprobs``: share of student-drawn tokens without the sampler's log-prob (NaN); 0 in a sound run.
    """
    if not rollouts:
        return {}
    lengths = np.array([len(rollout) for rollout in rollouts])
    ngrams = np.array([count_ngrams(rollout.completion_ids, config.ngram) for rollout in rollouts]).sum(0)
    loops = np.array([longest_loop(rollout.completion_ids, config.loop_length) for rollout in rollouts])
    drawn = [rollout.logprobs for rollout in rollouts if rollout.source == "student"]
    figures = {
        "truncated": np.mean([rollout.finish_reason == "length" for rollout in rollouts]),
        "one_token": np.mean(lengths == 1),
        "length/mean": lengths.mean(),
        **{f"length/q{q}": np.quantile(lengths, q / 100) for q in (10, 50, 90)},
        "length/max": lengths.max(),
        "repeated_ngrams": ngrams[0] / max(ngrams[1], 1),
        "loop_share": loops.sum() / lengths.sum(),
        "loop_max": loops.max(),
        "missing_logprobs": np.isnan(np.concatenate(drawn)).mean() if drawn else 0.0,
    }
    return {f"health/{name}": float(value) for name, value in figures.items()}


def token_health(tokens: StepTokens) -> dict[str, float]:
    """Of the tokens: entropy, importance ratios, divergence by position. Empty without any token.

    - ``entropy``: mean over all tokens, where the update computes it;
    - ``surprisal``: mean -log pi_S of the tokens drawn, whose expectation is the entropy;
    - ``ratio/q01, q50, q99, max``: of rho = pi_S / pi_sampler per drawn token. Where top-p or top-k cut the sampler's
      distribution they are not 1 even for equal weights: pi_S is not cut;
    - ``sample_size``: effective sample size of the drawn tokens over their number, (sum rho)^2 / (n sum rho^2);
      ``sample_size/sequence``: the same of whole completions;
    - ``divergence/A-B``: mean of the update's divergence at completion positions A to B (first position 0);
      ``kl/A-B``: mean log pi_S - log pi_T of the drawn tokens there, the one-sample estimate of reverse KL.
    """
    if not len(tokens.sequence_ids):
        return {}
    drawn = ~tokens.sampler_logprobs.isnan()
    bucket = position_buckets(tokens.sequence_ids)
    figures = {"entropy": tokens.entropy.double().mean().item()} if tokens.entropy is not None else {}
    figures |= _bucket_means("divergence", tokens.divergence, bucket)
    if bool(drawn.any()):
        student, teacher = tokens.student_logprobs[drawn].double(), tokens.teacher_logprobs[drawn].double()
        figures["surprisal"] = -student.mean().item()
        figures |= _bucket_means("kl", student - teacher, bucket[drawn])
        figures |= _ratio_figures(student, tokens.sampler_logprobs[drawn].double(), tokens.sequence_ids[drawn])
    return {f"health/{name}": value for name, value in figures.items()}


def _ratio_figures(student: Tensor, sampler: Tensor, sequence_ids: Tensor) -> dict[str, float]:
    everything = torch.ones_like(sequence_ids, dtype=torch.bool)
    ratios = importance_ratios(student, sampler, sequence_ids, everything)
    whole = importance_ratios(student, sampler, sequence_ids, everything, "sequence")
    first = torch.ones_like(everything)
    first[1:] = sequence_ids[1:] != sequence_ids[:-1]  # one ratio a completion
    q01, q50, q99 = np.quantile(ratios.cpu().numpy(), (0.01, 0.5, 0.99)).tolist()
    return {
        "ratio/q01": q01, "ratio/q50": q50, "ratio/q99": q99, "ratio/max": ratios.max().item(),
        "sample_size": _sample_size(ratios), "sample_size/sequence": _sample_size(whole[first]),
    }  # fmt: skip


def _sample_size(ratios: Tensor) -> float:
    return ratio_metrics(ratios, ratios, torch.ones_like(ratios, dtype=torch.bool))["ratio/ess"].item()


def position_buckets(sequence_ids: Tensor) -> Tensor:
    """[N] bucket of each token's position in its completion: 0 for positions 0-7, 1 for 8-15, 2 for 16-31, …"""
    index = torch.arange(len(sequence_ids), device=sequence_ids.device)
    starts = torch.searchsorted(sequence_ids, sequence_ids)  # of its sequence: the first entry not below its id
    position = (index - starts).double()
    return (position / BUCKET).clamp(min=0.5).log2().floor().long() + 1


def _bucket_means(name: str, values: Tensor, bucket: Tensor) -> dict[str, float]:
    means = {}
    for b in bucket.unique().tolist():
        low, high = (BUCKET << (b - 1) if b else 0), (BUCKET << b) - 1
        means[f"{name}/{low}-{high}"] = values[bucket == b].double().mean().item()
    return means


def health_warnings(metrics: dict[str, float], config: HealthConfig) -> dict[str, str]:
    """What is beyond its threshold: the figure's name -> a line that says what to do. Figures not there are passed.

    The caller says a line when its name appears, not in every step.
    """
    limits = [
        ("truncated", config.warn_truncated, 1, "of completions end without a stop token",
         "raise sampling.max_tokens; if they loop, set health.loop_stop"),
        ("repeated_ngrams", config.warn_repetition, 1, "of n-grams repeat an earlier one of their completion",
         "lower optim.learning_rate, set health.loop_stop, or warm-start for longer"),
        ("missing_logprobs", 0.0, 1, "of sampled tokens came without the sampler's log-prob",
         "importance ratios cannot correct them; try --rollouts.engine transformers"),
        ("entropy", config.warn_entropy, -1, "nats of mean entropy: the student is collapsing",
         "lower optim.learning_rate, or use a divergence that covers modes (gkd.divergence: forward_kl or jsd)"),
        ("sample_size", config.warn_sample_size, -1, "is the effective share of the sampled tokens",
         "sampler and trainer are far apart: lower optim.updates_per_step or optim.learning_rate"),
    ]  # fmt: skip
    said = {}
    for name, limit, sign, meaning, remedy in limits:
        value = metrics.get(f"health/{name}")
        if value is not None and limit is not None and sign * (value - limit) > 0:
            said[name] = f"{value:.3g} {meaning} (bound {limit:g}): {remedy}"
    return said
