"""Who scores the student's samples, and what a score is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from onpolicy.batching import Batch


@dataclass(frozen=True)
class Score:
    """The teacher's distribution at every completion token of a batch, in factored form.

    Hidden states instead of logits: 85 times smaller for the default teacher, and every loss projects them chunk by
    chunk, so a step's scores fit in memory whatever the vocabulary.
    """

    hidden: torch.Tensor  # [N, D_T] after the teacher's final norm
    head: torch.Tensor  # [V, D_T]; logits are hidden @ head.T

    def logprobs(self, token_ids: torch.Tensor, temperature: float) -> torch.Tensor:
        """log pi_T(y_t | h_t) of the given tokens at this temperature: [N] -> [N] float32, nats."""
        import torch

        from onpolicy.losses import chunked_logprobs

        with torch.no_grad():
            return chunked_logprobs(self.hidden, self.head, token_ids, temperature=temperature)

    def distributions(self, temperature: float, chunk_size: int = 64) -> Iterator[torch.Tensor]:
        """Log-probabilities over the vocabulary, [<=chunk_size, V] float32 at a time, in token order."""
        for hidden in self.hidden.split(chunk_size):
            yield ((hidden @ self.head.T).float() / temperature).log_softmax(-1)


class Teacher(Protocol):
    """Scores the completion tokens of a batch. Deterministic: the same batch gets the same score."""

    def score(self, batch: Batch) -> Score: ...
