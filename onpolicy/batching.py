"""From rollouts to tensors: prompts shared between their samples, rows of like length, a token budget a batch.

A *row* holds one prompt and every completion sampled from it: the prompt is computed once instead of n times.
Completions of a row cannot see one another: each attends to the prompt and to itself (onpolicy/attention.py), and its
positions continue from the prompt's, so every hidden state equals the one of the completion alone.

Shape legend: R rows, L positions of a row, N completion tokens of the batch, B rollouts of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from onpolicy.attention import Layout
from onpolicy.types import Prompt, Rollout


@dataclass(frozen=True)
class Batch:
    """Some rollouts as one forward pass. Completion tokens are flat and ordered by rollout, then by position."""

    input_ids: torch.Tensor  # [R, L] int64; the last token of a completion is never an input: nothing follows it
    position_ids: torch.Tensor  # [R, L] int64, continuing from the prompt in every completion
    layout: Layout | None  # how the completions of a row attend; None where prompts are not shared: a row is a sequence
    predict: torch.Tensor  # [N] int64, index into R*L of the position whose hidden state predicts the token
    token_ids: torch.Tensor  # [N] int64, the sampled tokens
    sequence_ids: torch.Tensor  # [N] int64, which rollout of `indices` a token belongs to, 0..B-1, non-decreasing
    sampler_logprobs: torch.Tensor  # [N] float32, NaN where no sampler drew the text
    indices: tuple[int, ...]  # [B] where the batch's rollouts stand in the list that was packed

    @property
    def num_inputs(self) -> int:
        """Positions computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        movable = {name: value for name, value in values.items() if isinstance(value, torch.Tensor | Layout)}
        values |= {name: value.to(device) for name, value in movable.items()}
        return Batch(**values)


def pack(rollouts: Sequence[Rollout], token_budget: int, *, share_prompts: bool = True, pad_id: int = 0) -> list[Batch]:
    """Rollouts -> batches of at most ``token_budget`` positions (rows x longest row), longest rows first.

    Longest first, so that memory peaks in the first batch and not an hour into a run. A single row longer than
    the budget still makes a batch of its own: the budget bounds memory, it drops nothing.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")
    rows = _rows(rollouts, share_prompts, token_budget)
    lengths = [_row_length(rollouts, row) for row in rows]
    order = sorted(range(len(rows)), key=lambda r: (-lengths[r], rows[r][0]))
    batches: list[Batch] = []
    current: list[list[int]] = []
    longest = 0
    for r in order:
        if current and (len(current) + 1) * longest > token_budget:
            batches.append(_collate(rollouts, current, pad_id, share_prompts))
            current = []
        longest = lengths[r] if not current else longest
        current.append(rows[r])
    if current:
        batches.append(_collate(rollouts, current, pad_id, share_prompts))
    return batches


def _rows(rollouts: Sequence[Rollout], share_prompts: bool, token_budget: int) -> list[list[int]]:
    """Which rollouts share a row: those of one prompt, as many as the budget takes."""
    if not share_prompts:
        return [[i] for i in range(len(rollouts))]
    rows: list[list[int]] = []
    open_row: dict[tuple[int, ...], int] = {}
    for i, rollout in enumerate(rollouts):
        prompt = rollout.prompt.token_ids
        r = open_row.get(prompt)
        if r is not None and _row_length(rollouts, [*rows[r], i]) <= token_budget:
            rows[r].append(i)
        else:
            open_row[prompt] = len(rows)
            rows.append([i])
    return rows


def _row_length(rollouts: Sequence[Rollout], row: list[int]) -> int:
    return len(rollouts[row[0]].prompt.token_ids) + sum(len(rollouts[i]) - 1 for i in row)


def _collate(rollouts: Sequence[Rollout], rows: list[list[int]], pad_id: int, share_prompts: bool) -> Batch:
    width = max(_row_length(rollouts, row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    predict: list[np.ndarray] = []
    sequences: list[np.ndarray] = []  # of each completion: the positions of its prompt, then its own
    for r, row in enumerate(rows):
        prompt = rollouts[row[0]].prompt.token_ids
        end = len(prompt)
        input_ids[r, :end], positions[r, :end] = prompt, np.arange(end)
        for i in row:
            inputs = rollouts[i].completion_ids[:-1]
            start, end = end, end + len(inputs)
            input_ids[r, start:end] = inputs
            positions[r, start:end] = len(prompt) + np.arange(len(inputs))
            sequences.append(r * width + np.concatenate([np.arange(len(prompt)), np.arange(start, end)]))
            predict.append(sequences[-1][len(prompt) - 1 :])
    members = [i for row in rows for i in row]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        layout=_layout(sequences, input_ids.size) if share_prompts else None,
        predict=torch.from_numpy(np.concatenate(predict)),
        token_ids=torch.from_numpy(np.concatenate([rollouts[i].completion_ids for i in members]).astype(np.int64)),
        sequence_ids=torch.repeat_interleave(torch.tensor([len(rollouts[i]) for i in members])),
        sampler_logprobs=torch.from_numpy(np.concatenate([rollouts[i].logprobs for i in members]).astype(np.float32)),
        indices=tuple(members),
    )


def _layout(sequences: list[np.ndarray], positions: int) -> Layout:
    """The completions laid out alone, each padded at its end with position 0."""
    longest = max(map(len, sequences))
    gather = np.zeros((len(sequences), longest), np.int64)
    scatter = np.full(positions, -1, np.int64)
    spans = np.zeros((len(sequences), 2), np.int64)
    for s, sequence in enumerate(sequences):
        gather[s, : len(sequence)] = sequence
        known = int((scatter[sequence] >= 0).sum())  # its prompt's, where an earlier completion has it
        scatter[sequence[known:]] = s * longest + np.arange(known, len(sequence))
        spans[s] = known, len(sequence)
    scatter[scatter < 0] = 0  # a row's padding points anywhere
    return Layout(torch.from_numpy(gather), torch.from_numpy(scatter), torch.from_numpy(spans))


def text_rollout(prompt: Prompt, completion_ids: Sequence[int], policy_version: int = 0) -> Rollout:
    """A dataset's own completion as a rollout (no sampler drew it, so its log-probs are NaN)."""
    ids = np.asarray(completion_ids, np.int64)
    return Rollout(prompt, ids, np.full(len(ids), np.nan, np.float32), "stop", policy_version, source="dataset")
