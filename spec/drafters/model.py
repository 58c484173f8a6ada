"""A smaller language model as drafter, the distilled student for one.

Shape legend: A sequences that still draft, M drafted tokens of all, D columns of the draft's head, V the target's
vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spec.drafters.alignment import head_columns
from spec.drafters.base import Context
from spec.kv_cache import best_source
from spec.models.base import LanguageModel, Step
from spec.random import Purpose, uniforms
from spec.rows import Scores, allowed_rows, score
from spec.verify import Drafts, sample

Drafting = Literal["probabilistic", "greedy"]


@dataclass(eq=False)
class _Sequence:
    context: Context
    slot: int | None  # None: this sequence is not drafted for
    capacity: int = 0  # of the slot
    cached: int = 0  # committed tokens in the draft's cache
    drafted: int = 0  # by the last proposal

    def room(self) -> int:
        """Drafts that fit: the last one is never fed, so n + K - 1 tokens are cached."""
        return 0 if self.slot is None else self.capacity - len(self.context) + 1


class ModelDrafter:
    """Drafts with a language model, all sequences in one forward pass a token.

    ``probabilistic`` draws each token from the draft's processed distribution q, keyed by the DRAFT stream, and is
    accepted with probability sum min(p, q). ``greedy`` proposes argmax q, one-hot, accepted with p(argmax q).

    Args:
        model: the draft; its cache is this drafter's. target: whose vocabulary the drafts are in.
        vocabulary: [D] target id of each column of the draft's head, where the head is reduced; every other token has
            q = 0, which is exact. None: column i is token i, and where the two vocabularies are padded to different
            sizes, columns beyond the target's are cut and target tokens without a column have q = 0.
        prefill_tokens: prompt tokens a forward pass.

    A draft whose logits are not finite stops drafting for that sequence, with a RuntimeWarning that names the position:
    the text stays the target's. So does one whose context is full. Raises ValueError for a vocabulary that does not
    fit; warns about a draft larger than its target.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: LanguageModel,
        *,
        drafting: Drafting = "probabilistic",
        vocabulary: Tensor | None = None,
        prefill_tokens: int = 512,
    ):
        if drafting not in ("probabilistic", "greedy"):
            raise ValueError(f"drafting={drafting!r}: choose probabilistic or greedy")
        if model.num_parameters > target.num_parameters:
            warnings.warn(
                f"the draft {model.name} has {model.num_parameters:,} parameters and its target {target.name} only "
                f"{target.num_parameters:,}: exact, but slower than no draft; are the two swapped?",
                stacklevel=2,
            )
        self.name, self.model = model.name, model
        self._greedy, self._prefill_tokens = drafting == "greedy", prefill_tokens
        self._vocabulary = target.vocab_size
        self._columns = head_columns(model, target, vocabulary)
        self._embedded = self._vocabulary if vocabulary is not None else model.vocab_size
        self._sequences: dict[int, _Sequence] = {}

    def open(self, context: Context) -> bool:
        """See :class:`spec.drafters.base.Drafter`."""
        capacity = min(context.capacity, self.model.max_positions)
        if capacity <= len(context.prompt_ids):
            self._sequences[context.id] = _Sequence(context, None)
            return True
        slot = self.model.open(capacity)
        if slot is None:
            return False
        self._sequences[context.id] = _Sequence(context, slot, capacity)
        return True

    def propose(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Drafts:
        """K forward passes, the first of which also reads what was committed since the last proposal."""
        sequences = [self._sequences[context.id] for context in contexts]
        wanted = [max(min(length, s.room()), 0) for length, s in zip(lengths, sequences, strict=True)]
        block = _Block(self._greedy, self._vocabulary, self._columns, wanted)
        for i in range(max(wanted, default=0)):
            active = [b for b, size in enumerate(wanted) if size > i and len(block.ids[b]) == i]
            if not active:
                break
            logits = self._feed([sequences[b] for b in active], [block.ids[b] for b in active])
            for b in block.extend(active, logits, [contexts[b] for b in active]):
                self._give_up(sequences[b], i)
        for sequence, ids in zip(sequences, block.ids, strict=True):
            sequence.drafted = len(ids)
        return block.drafts()

    def commit(self, context: Context, accepted: int) -> None:
        """Accepted drafts are in the cache already, but for the last of a block: it was never fed."""
        sequence = self._sequences[context.id]
        if sequence.drafted:
            sequence.cached += min(accepted, sequence.drafted - 1)
            sequence.drafted = 0

    def close(self, context: Context) -> None:
        sequence = self._sequences.pop(context.id)
        if sequence.slot is not None:
            self.model.close(sequence.slot)

    def _feed(self, sequences: list[_Sequence], drafted: list[list[int]]) -> Tensor:
        """Logits [A, D] after each sequence's committed and drafted tokens; caches all of them."""
        fed: list[list[int]] = []
        starts: list[int] = []
        for sequence, ids in zip(sequences, drafted, strict=True):
            if not ids:
                self._take_over(sequence)  # before any of them counts what this pass will read
        for sequence, ids in zip(sequences, drafted, strict=True):
            total = len(sequence.context)
            if ids:
                fed.append(ids[-1:])
                starts.append(total + len(ids) - 1)
            else:
                self._read(sequence, total - self._prefill_tokens)
                fed.append(sequence.context.tokens(sequence.cached, total))
                starts.append(sequence.cached)
                sequence.cached = total
        return self._forward([s.slot for s in sequences], starts, fed, logits=True)

    def _take_over(self, sequence: _Sequence) -> None:
        """Copies what a prompt has in common with one that was read."""
        prompt = sequence.context.prompt_ids
        if sequence.cached >= len(prompt) - 1 or sequence.slot is None:
            return
        slot, tokens = best_source(
            prompt,
            ((other.slot, other.context.prompt_ids, other.cached)
             for other in self._sequences.values() if other is not sequence and other.slot is not None),
        )  # fmt: skip
        if tokens > sequence.cached:
            self.model.fork(slot, sequence.slot, tokens)
            sequence.cached = tokens

    def _read(self, sequence: _Sequence, stop: int) -> None:
        """Caches committed tokens up to ``stop``, in parts: the activations of a long prompt would fill the memory."""
        while sequence.cached < stop:
            start, end = sequence.cached, min(sequence.cached + self._prefill_tokens, stop)
            self._forward([sequence.slot], [start], [sequence.context.tokens(start, end)], logits=False)
            sequence.cached = end

    def _forward(self, slots: list[int | None], starts: list[int], fed: list[list[int]], logits: bool) -> Tensor:
        sizes = np.array([len(ids) for ids in fed])
        ids = [token for part in fed for token in part]
        if self._embedded < self._vocabulary:  # a target token the draft has no embedding for: any will do
            ids = [token if token < self._embedded else 0 for token in ids]
        last = np.cumsum(sizes) - 1
        return self.model.forward(
            Step(
                token_ids=torch.tensor(ids, device=self.model.device),
                slots=np.array(slots),
                starts=np.array(starts),
                lengths=sizes,
                logit_rows=last if logits else last[:0],
            )
        )

    def _give_up(self, sequence: _Sequence, drafted: int) -> None:
        warnings.warn(
            f"{self.name}: non-finite logits at position {len(sequence.context) - 1 + drafted} of the sequence; it is "
            "decoded without drafts from here on. Check the draft's weights for NaN, or try float32.",
            RuntimeWarning,
            stacklevel=4,
        )
        assert sequence.slot is not None
        self.model.close(sequence.slot)
        sequence.slot = None


class _Block:
    """The tokens of one proposal as they are drawn, one of each active sequence at a time."""

    def __init__(self, greedy: bool, vocabulary: int, columns: Tensor | None, wanted: list[int]):
        self._greedy, self._vocabulary, self._columns = greedy, vocabulary, columns
        self.ids: list[list[int]] = [[] for _ in wanted]
        self._rows: list[list[int]] = [[] for _ in wanted]  # of probs, -1 where the token is the argmax
        self._probs: Tensor | None = None  # [M, V], in the order drawn
        self._size, self._filled = sum(wanted), 0
        self._device: torch.device | None = None

    def extend(self, active: list[int], logits: Tensor, contexts: list[Context]) -> list[int]:
        """Draws a token for each active sequence from [A, D] logits; returns the sequences whose row is NaN or +inf.

        One whose row is all -inf (no token that it may say is in a reduced vocabulary) gets none and stops here.
        """
        self._device = logits.device
        scores, mapped = self._score(active, logits, contexts)
        if self._greedy or scores.greedy:
            tokens, first_row = scores.argmax(), -1
        else:
            i = len(self.ids[active[0]])
            noise = uniforms(
                [c.params.seed for c in contexts], Purpose.DRAFT, [len(c.output_ids) + i for c in contexts],
                [c.round for c in contexts],
            )  # fmt: skip
            probs = scores.probs()
            tokens, first_row = sample(probs, noise), self._store(probs, mapped)
        if mapped and self._columns is not None:
            tokens = self._columns[tokens]
        for a, (b, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            if a not in scores.broken:
                self.ids[b].append(token)
                self._rows[b].append(first_row + a if first_row >= 0 else -1)
        return [active[a] for a in scores.broken if a not in scores.empty]

    def drafts(self) -> Drafts:
        """All of it, sequence after sequence."""
        ids, rows = ([x for part in parts for x in part] for parts in (self.ids, self._rows))
        lengths = [len(part) for part in self.ids]
        as_rows = None if self._probs is None else torch.tensor(rows, dtype=torch.long, device=self._device)
        return Drafts(torch.tensor(ids, dtype=torch.long, device=self._device), lengths, self._probs, as_rows)

    def _score(self, active: list[int], logits: Tensor, contexts: list[Context]) -> tuple[Scores, bool]:
        """Scores over the draft's columns where nothing names tokens (cheaper), else over the target's vocabulary."""
        params = [context.params for context in contexts]
        columns, drafted = self._columns, [self.ids[b] for b in active]
        allowed = allowed_rows(contexts, drafted, self._vocabulary, logits.device, last=True)
        if columns is None:
            logits = logits[:, : self._vocabulary]
        elif allowed is not None or any(p.penalised or p.logit_bias or p.allowed_token_ids is not None for p in params):
            dense = logits.new_full((len(logits), self._vocabulary), -torch.inf)
            logits, columns = dense.index_copy_(1, columns, logits), None
        prompts: list[Sequence[int]] = [context.prompt_ids for context in contexts]
        outputs: list[Sequence[int]] = [()] * len(contexts)
        for a, (ids, context) in enumerate(zip(drafted, contexts, strict=True)):
            if context.params.penalised:
                outputs[a] = [*context.output_ids, *ids]
        return score(logits, params, prompts, outputs, allowed), columns is not None

    def _store(self, probs: Tensor, mapped: bool) -> int:
        """Writes [A, D or V] rows as [A, V] ones; returns the first one's number."""
        if self._probs is None:
            make = torch.empty if self._columns is None else torch.zeros
            self._probs = make(self._size, self._vocabulary, dtype=probs.dtype, device=probs.device)
        first, self._filled = self._filled, self._filled + len(probs)
        if mapped and self._columns is not None:
            self._probs[first : self._filled].index_copy_(1, self._columns, probs)
        else:
            self._probs[first : self._filled] = probs
        return first
