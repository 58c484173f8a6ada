"""Several drafters as one: the first that proposes for a sequence serves it, in every round anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec.drafters.base import Context, Drafter
from spec.verify import Drafts


class Fallback:
    """Asks its members in order; each is asked only about the sequences that those before it had nothing for.

    A member declines a sequence by proposing no token, as the lookups do below their shortest match. Nothing that was
    proposed is ever discarded: who serves depends on the committed text alone, so the step stays exact even where a
    member draws its tokens.

    A member is told (``commit``) how its own proposals fared, and of no others: in rounds served by another member the
    context grows without a word, by any number of tokens. A member with a cache therefore finds what it has yet to take
    in from ``len(context)`` when it is next asked.
    """

    def __init__(self, *members: Drafter) -> None:
        """Cheap and specific drafters first. Raises ValueError without members."""
        if not members:
            raise ValueError("Fallback needs at least one drafter")
        self.members = members
        self.name = "+".join(member.name for member in members)
        self._asked: dict[int, list[Drafter]] = {}  # sequence -> whom its next commit concerns

    def open(self, context: Context) -> bool:
        """All members or none: who drafts for a sequence must not depend on how full the engine was."""
        opened: list[Drafter] = []
        for member in self.members:
            if not member.open(context):
                for other in opened:
                    other.close(context)
                return False
            opened.append(member)
        return True

    def propose(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Drafts:
        self._asked.update((context.id, []) for context in contexts)
        parts: list[tuple[list[int], Drafts]] = []
        waiting = [b for b, length in enumerate(lengths) if length > 0]
        for member in self.members:
            if not waiting:
                break
            drafts = member.propose([contexts[b] for b in waiting], [lengths[b] for b in waiting])
            parts.append((waiting, drafts))
            for b, drafted in zip(waiting, drafts.lengths, strict=True):
                asked = self._asked[contexts[b].id]
                self._asked[contexts[b].id] = [member] if drafted else [*asked, member]
            waiting = [b for b, drafted in zip(waiting, drafts.lengths, strict=True) if not drafted]
        return merged(parts, len(contexts))

    def commit(self, context: Context, accepted: int) -> None:
        """To the member that served; where none did, to all that were asked and proposed nothing."""
        for member in self._asked.pop(context.id, ()):
            member.commit(context, accepted)

    def close(self, context: Context) -> None:
        self._asked.pop(context.id, None)
        for member in self.members:
            member.close(context)


def merged(parts: Sequence[tuple[Sequence[int], Drafts]], batch: int) -> Drafts:
    """One batch from proposals for disjoint sequences of it.

    Args:
        parts: the sequences, by index in the batch, that each set of drafts is for. A sequence may be named more than
            once if at most one names any token for it.
        batch: B. Sequences that no part names are drafted no token.

    Everything goes to the device of the drawn proposals, if there are any. Their rows are not copied when only one
    part has them.
    """
    drawn = [drafts.probs for _, drafts in parts if drafts.probs is not None]
    device = drawn[0].device if drawn else torch.device("cpu")
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    pieces: list[tuple[Tensor, Tensor]] = [(nothing, nothing)] * batch
    row = 0
    for sequences, drafts in parts:
        ids, rows = drafts.ids.to(device), drafts.probs_rows.to(device)
        rows = torch.where(rows >= 0, rows + row, rows)
        for b, start, length in zip(sequences, drafts.token_starts.tolist(), drafts.lengths, strict=True):
            if length:
                assert not len(pieces[b][0]), f"sequence {b} was served twice"
                pieces[b] = ids[start : start + length], rows[start : start + length]
        row += 0 if drafts.probs is None else len(drafts.probs)
    ids, rows = (torch.cat([nothing, *column]) for column in zip(*pieces, strict=True)) if pieces else (nothing,) * 2
    probs = None if not drawn else drawn[0] if len(drawn) == 1 else torch.cat(drawn)
    return Drafts(ids, [len(piece) for piece, _ in pieces], probs, rows if drawn else None)
