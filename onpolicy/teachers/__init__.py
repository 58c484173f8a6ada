"""Who scores the student's samples, what a score is, and what several scores make together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from onpolicy.batching import Batch


@dataclass(frozen=True)
class Score:
    """A model's distribution at every completion token of a batch, in factored form.

    Hidden states instead of logits: 85 times smaller for the default teacher, and every loss projects them chunk by
    chunk, so a step's scores fit in memory whatever the vocabulary.
    """

    hidden: torch.Tensor  # [N, D_T] after the model's final norm
    head: torch.Tensor  # [V, D_T]; logits are hidden @ head.T

    def logprobs(self, token_ids: torch.Tensor, temperature: float) -> torch.Tensor:
        """log pi_T(y_t | h_t) of the given tokens at this temperature: [N] -> [N] float32, nats."""
        import torch

        from onpolicy.losses import chunked_logprobs

        with torch.no_grad():
            return chunked_logprobs(self.hidden, self.head, token_ids, temperature=temperature)


@dataclass(frozen=True)
class Verdict:
    """All that is said of a batch: by the teachers, by the model rewards lead away from, by the task."""

    teachers: tuple[Score, ...]  # K scores
    weights: tuple[float, ...] = (1.0,)  # [K] positive, summing to 1
    reference: Score | None = None  # for reward extrapolation
    task_rewards: torch.Tensor | None = None  # [B] float32, of every rollout

    def logprobs(self, token_ids: torch.Tensor, temperature: float) -> torch.Tensor:
        """Weighted mean of the teachers' log-probs of the given tokens: [N] -> [N] float32, nats."""
        from onpolicy.losses.rewards import combine_teachers

        return combine_teachers([score.logprobs(token_ids, temperature) for score in self.teachers], self.weights)


class Teacher(Protocol):
    """Scores the completion tokens of a batch. Deterministic: the same batch gets the same score."""

    def score(self, batch: Batch) -> Score: ...
