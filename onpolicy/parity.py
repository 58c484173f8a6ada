"""Does the sampler really have the trainer's weights? Its log-probs of its own tokens must be the trainer's.

Weight sync can fail in silence: a stale output matrix still writes fluent text, from a policy that is neither the old
nor the new one (docs/decisions.md, "the tied lm_head"). So the comparison is made in every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from onpolicy.batching import Batch
from onpolicy.types import SamplingParams
from spec.sampling import processed_logprobs

MAX_PROCESSED_TOKENS = 256  # rows of the vocabulary looked at when top-p or top-k make that necessary


class ParityError(RuntimeError):
    """Sampler and trainer disagree: the policy that samples is not the policy that is trained."""


@dataclass
class ParityMeter:
    """Collects |log-prob difference| over a step's tokens."""

    total: float = 0.0
    largest: float = 0.0
    tokens: int = 0

    def add(self, trainer: torch.Tensor, sampler: torch.Tensor) -> None:
        """[n] log-probs of the same tokens; those no sampler drew (NaN) and those cut off on one side are left out."""
        difference = (trainer - sampler).abs()
        difference = difference[difference.isfinite()]
        if len(difference):
            self.total += difference.double().sum().item()
            self.largest = max(self.largest, difference.max().item())
            self.tokens += len(difference)

    @classmethod
    def join(cls, parts: Sequence[ParityMeter]) -> ParityMeter:
        """The same over the tokens of all parts (one or more)."""
        total, tokens = sum(part.total for part in parts), sum(part.tokens for part in parts)
        return cls(total, max(part.largest for part in parts), tokens)

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0

    def metrics(self) -> dict[str, float]:
        return {"sync/logprob_abs_diff": self.mean, "sync/logprob_max_diff": self.largest} if self.tokens else {}

    def check(self, bound: float, step: int) -> None:
        """Raise ParityError when the mean difference is beyond ``bound`` nats."""
        if self.mean > bound:
            raise ParityError(
                f"step {step}: the sampler's log-probs of its own tokens differ from the trainer's by "
                f"{self.mean:.3f} nats on average (bound {bound}, largest {self.largest:.2f}): the sampler does not "
                "have the weights that are being trained, so this step was not applied. "
                "Start another --name with rollouts.engine: transformers (a run keeps its engine); if the difference "
                "goes away, the engine's weight sync is at fault (its version is not one this project was tested "
                "with); if it stays, raise rollouts.parity_bound (and --resume) only after explaining it (other dtype, "
                "other temperature handling)"
            )


def processed_as_sampled(
    batch: Batch, hidden: torch.Tensor, head: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """(trainer's, sampler's) log-probs of some of the batch's tokens, the trainer's cut by top-p and top-k likewise."""
    chosen = slice(0, MAX_PROCESSED_TOKENS)
    with torch.no_grad():
        logits = (hidden[chosen] @ head.to(hidden.dtype).T).float()
        rows = processed_logprobs(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
        trainer = rows.gather(1, batch.token_ids[chosen, None])[:, 0]
    return trainer, batch.sampler_logprobs[chosen]
