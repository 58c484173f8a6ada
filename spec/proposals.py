"""How far to draft, and the drafts: what the engine does before the target's forward pass.

Shape legend: B sequences, M drafted tokens of all of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spec.drafters.base import Drafter
from spec.sequence import Sample
from spec.verify import Drafts

if TYPE_CHECKING:
    from spec.draft_length import DraftLength


@dataclass(frozen=True)
class Proposal:
    """Drafts of B sequences, most of which may have none."""

    drafts: Drafts  # on the target's device
    tokens: list[int]  # [M] drafts.ids on the host
    lengths: list[int]  # [B]
    asked: frozenset[int]  # of range(B): the drafter proposed for these, perhaps nothing
    by_policy: list[int]  # of range(B): whose length was the policy's choice
    seconds: float

    def of(self, b: int, accepted: int) -> list[int]:
        """The first ``accepted`` drafted tokens of sequence b."""
        start = int(self.drafts.token_starts[b])
        return self.tokens[start : start + accepted]


class Proposer:
    """A drafter and the policy that says how far it drafts. Without a drafter every proposal is empty."""

    def __init__(self, drafter: Drafter | None, policy: DraftLength, device: torch.device):
        self._drafter, self._policy, self._device = drafter, policy, device

    def propose(self, samples: Sequence[Sample]) -> Proposal:
        """Never beyond max_tokens or the context."""
        wanted, by_policy = self._lengths(samples)
        begin = time.perf_counter()  # the choice takes as long where nothing is drafted
        asked = [b for b, length in enumerate(wanted) if length > 0]
        lengths = [0] * len(samples)
        if self._drafter is None or not asked:
            drafts = Drafts(torch.empty(0, dtype=torch.long, device=self._device), lengths)
            return Proposal(drafts, [], lengths, frozenset(), by_policy, time.perf_counter() - begin)
        own = self._drafter.propose([samples[b].context for b in asked], [wanted[b] for b in asked])
        for b, size in zip(asked, own.lengths, strict=True):
            assert size <= wanted[b], f"{self._drafter.name} drafted {size} tokens where {wanted[b]} were asked for"
            lengths[b] = size
        drafts = Drafts(own.ids.to(self._device), lengths, own.probs, own.rows)
        return Proposal(
            drafts, own.ids.tolist(), lengths, frozenset(asked), by_policy, time.perf_counter() - begin
        )  # fmt: skip

    def observe(
        self, samples: Sequence[Sample], proposal: Proposal, accepted: list[int], seconds: float, prompt_rows: int
    ) -> None:
        """Tells the policy what became of the sequences it decided for, in every step.

        ``seconds`` the target took, for ``prompt_rows`` tokens of prompts too. Timings of a step in which a request had
        a length of its own are not the policy's doing and not passed on.
        """
        mine = proposal.by_policy
        if not mine:
            return
        timed = len(mine) == len(samples)
        self._policy.observe(
            [samples[b].context for b in mine],
            [proposal.lengths[b] for b in mine],
            [accepted[b] for b in mine],
            seconds if timed else None,
            proposal.seconds if timed else None,
            prompt_rows,
        )

    def commit(self, sample: Sample, accepted: int) -> None:
        """The sample's proposal was verified, and it goes on."""
        if self._drafter is not None:
            self._drafter.commit(sample.context, accepted)

    def forget(self, sample: Sample) -> None:
        """It ended."""
        self._policy.forget(sample.context)

    def _lengths(self, samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
        """[B] at most so many drafts, a request's own number before the policy's; and for whom the policy chose."""
        lengths = [0] * len(samples)
        free: list[int] = []
        for b, sample in enumerate(samples):
            own = sample.task.request.draft_length
            if sample.drafting and own is None:
                free.append(b)
            elif sample.drafting and own is not None:
                lengths[b] = min(own, sample.most_drafts)
        if free:
            limits = [samples[b].most_drafts for b in free]
            chosen = self._policy.lengths([samples[b].context for b in free], limits)
            for b, length, limit in zip(free, chosen, limits, strict=True):
                assert 0 <= length <= limit, f"the policy wants {length} drafts where {limit} fit"
                lengths[b] = length
        return lengths, free
