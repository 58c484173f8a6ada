"""From rows of logits to decisions: what the engine and a draft model do with a forward pass.

Shape legend: B sequences, K_b drafts of sequence b, M = sum K_b, N = M + B rows of the target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from spec.drafters.base import Context
from spec.params import Params, row_options
from spec.random import block_uniforms
from spec.request import TokenLogprob
from spec.sampling import adjusted_logits, processed_logprobs, processed_probs, scaled_top
from spec.verify import Drafts, Mode, verify, verify_greedy

LogprobSource = Literal["raw", "processed"]
_SHAPING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Scores:
    """Rows after mask, bias and penalties, and what is left to make of them."""

    values: Tensor  # [N, V]; a broken row is all 0, so that the others can go on
    shaping: dict[str, Any]  # temperature, top-k, top-p, min-p where any row has them
    greedy: bool  # every row is
    broken: list[int]  # rows with NaN, +inf or nothing but -inf, before or after temperature
    empty: list[int]  # those of them with nothing but -inf: a mask left none, or the model itself

    def argmax(self) -> Tensor:
        """[N] int64, the lowest id on ties."""
        return self.values.argmax(-1)

    def probs(self) -> Tensor:
        """[N, V] processed probabilities."""
        return processed_probs(self.values, check=False, **self.shaping)


def score(
    logits: Tensor,
    params: Sequence[Params],
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    allowed: Tensor | None = None,
) -> Scores:
    """Logits [N, V] of rows with their own [N] parameters and, for penalties, histories. May change ``logits``.

    ``allowed``: [N, V] bool, of :func:`allowed_rows`, on top of what the parameters allow.
    """
    options = row_options(params, logits.shape[-1], prompts, outputs, logits.device)
    if allowed is not None:
        options["allowed"] = allowed & options["allowed"] if "allowed" in options else allowed
    shaping = {name: options.pop(name) for name in _SHAPING if name in options}
    values = adjusted_logits(logits, **options)
    top = scaled_top(values, shaping.get("temperature", 1.0))  # shows NaN, +inf and a row of -inf alike
    finite = top.isfinite()
    broken = [] if bool(finite.all()) else (~finite).nonzero().flatten().tolist()
    empty = [row for row in broken if float(top[row]) == -torch.inf]
    if broken:
        values[broken] = 0.0
    return Scores(values, shaping, all(row.greedy for row in params), broken, empty)


def allowed_rows(
    contexts: Sequence[Context], drafted: Sequence[Sequence[int]], vocabulary: int, device: torch.device, *, last: bool
) -> Tensor | None:
    """[N, V] bool: what the constraints of B sequences leave of each row; None where none has any.

    ``drafted``: the drafts of each; ``last``: the row behind them alone, which are then known to be allowed.
    """
    if all(context.constraint is None for context in contexts):
        return None
    parts: list[np.ndarray] = []
    for context, ids in zip(contexts, drafted, strict=True):
        first = len(ids) if last else 0
        if context.constraint is None:
            parts.append(np.ones((len(ids) + 1 - first, vocabulary), dtype=bool))
        else:
            parts.append(context.constraint.rows(context.output_ids, ids, first))
    return torch.from_numpy(np.concatenate(parts)).to(device)


@dataclass(frozen=True)
class Verdict:
    """What a forward pass of the target came to for B sequences."""

    accepted: list[int]  # [B] drafted tokens that stand
    tokens: list[int | None]  # [B] the target's own token after them; None where its row there is not finite
    logits: Tensor  # [N, V] as the model returned them
    scores: Tensor  # [N, V] after mask, bias and penalties
    first_rows: list[int]  # [B]


def decide(logits: Tensor, contexts: Sequence[Context], drafts: Drafts, drafted: list[int], mode: Mode) -> Verdict:
    """Verifies a batch: logits [N, V], drafts of B sequences whose M tokens are also given as the list ``drafted``.

    Noise is keyed by seed, output position, round and purpose (:mod:`spec.random`), so no sequence sees the others.
    Where every request is greedy the argmax ids decide alone and no probability is computed.

    A broken row is decided on as if it were uniform: exact for a target that is uniform there, and otherwise ours.
    Texts of the two have one law up to the first broken row that they come to, and there ours stop. One behind a token
    that is not kept, which plain decoding would not have seen, changes nothing.
    """
    lengths = drafts.host_lengths.tolist()
    first_rows = (drafts.token_starts + range(len(lengths))).tolist()
    params = [c.params for c, size in zip(contexts, lengths, strict=True) for _ in range(size + 1)]
    proposals = [drafted[start : start + size] for start, size in zip(drafts.token_starts, lengths, strict=True)]
    allowed = allowed_rows(contexts, proposals, logits.shape[-1], logits.device, last=False)
    scores = score(logits, params, *_histories(contexts, lengths, drafted), allowed)
    if scores.greedy:
        accepted, tokens = verify_greedy(scores.argmax(), drafts.ids, lengths)
    else:
        noise = block_uniforms(
            [c.params.seed for c in contexts], [len(c.output_ids) for c in contexts], lengths,
            [c.round for c in contexts],
        )  # fmt: skip
        verdicts = verify(scores.probs(), drafts, noise.accept, noise.last, mode=mode)
        accepted, tokens = verdicts.accepted, verdicts.tokens
    kept: list[int] = accepted.tolist()
    own: list[int | None] = tokens.tolist()
    for b, offset in _first_broken(scores.broken, first_rows).items():
        if offset <= kept[b]:
            kept[b], own[b] = offset, None
    return Verdict(kept, own, logits, scores.values, first_rows)


def logprobs(
    verdict: Verdict, b: int, tokens: Sequence[int], top: int, params: Params, source: LogprobSource
) -> list[TokenLogprob]:
    """Log-probabilities of the n tokens that sequence ``b`` commits, from its first n rows.

    ``raw``: log-softmax of the model's logits, before mask, bias, penalties, temperature and cuts (vLLM's and OpenAI's
    convention). ``processed``: of the distribution that was sampled from; at temperature 0 the argmax has 0.
    """
    rows = slice(verdict.first_rows[b], verdict.first_rows[b] + len(tokens))
    if source == "raw":
        law = verdict.logits[rows].log_softmax(-1)
    else:
        shaping = {name: getattr(params, name) for name in _SHAPING}
        law = processed_logprobs(verdict.scores[rows], check=False, **shaping)
    chosen = law.gather(-1, torch.tensor(tokens, device=law.device)[:, None])[:, 0].tolist()
    best, ids = (part.tolist() for part in law.topk(top, -1))
    return [
        TokenLogprob(token, value, tuple(zip(row_ids, row_best, strict=True)))
        for token, value, row_ids, row_best in zip(tokens, chosen, ids, best, strict=True)
    ]


def _histories(
    contexts: Sequence[Context], lengths: list[int], drafted: list[int]
) -> tuple[list[Sequence[int]] | None, list[Sequence[int]] | None]:
    """Prompt and output before each row, drafted tokens included; None where no sequence has penalties."""
    if not any(c.params.penalised for c in contexts):
        return None, None
    prompts: list[Sequence[int]] = []
    outputs: list[Sequence[int]] = []
    at = 0
    for context, size in zip(contexts, lengths, strict=True):
        for i in range(size + 1):
            prompts.append(context.prompt_ids)
            outputs.append([*context.output_ids, *drafted[at : at + i]] if context.params.penalised else ())
        at += size
    return prompts, outputs


def _first_broken(rows: list[int], first_rows: list[int]) -> dict[int, int]:
    """Sequence -> offset in its rows of the first broken one."""
    broken: dict[int, int] = {}
    for row in rows:
        b = max(i for i, first in enumerate(first_rows) if first <= row)
        broken.setdefault(b, row - first_rows[b])
    return broken
