"""Named wrong laws: what an engine with a known fault would draw from, computed from the target's own logits.

Every law here is a function of the text *before* the token, so that the likelihood ratio law(x) / p(x) has mean at
most 1 under the target, whatever the law: a bad guess costs power, never validity.

Shape legend: n rows, V vocabulary; p target, q draft, S the support of p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spec.audit.sums import (
    EXPONENTS,
    LENIENCE,
    Overlaps,
    RowSums,
    mass_outside,
    overlaps,
    power_sums,
    row_sums,
    top_tokens,
)
from spec.params import Params, row_options
from spec.sampling import adjusted_logits, processed_probs

RECENT = 8  # tokens: some two blocks
_HOT = 50.0
_NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logit_bias": {}, "allowed_token_ids": None,
}  # fmt: skip
NO_PENALTIES: dict[str, Any] = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class Rows:
    """n rows and what shapes them."""

    logits: Tensor  # [n, V]
    params: list[Params]  # [n]
    prompts: list[Sequence[int]]  # [n]; read for penalties only
    outputs: list[Sequence[int]]  # [n] tokens before each row's
    tokens: Tensor  # [n] int64 what the engine said
    previous: Tensor  # [n] int64 the token before, -1 at the start of a completion
    twins: Tensor  # [n] int64 what an earlier answer to the same request said there, -1: none, or it has diverged
    recent: Tensor | None = None  # [n, RECENT] int64 the tokens before, newest first, -1 before the start


@dataclass(frozen=True)
class Laws:
    """The processed laws of n rows, and sums over them that are taken once."""

    p: Tensor  # [n, V]
    q: Tensor | None = None  # [n, V]
    last: Tensor | None = None  # [V] p of the row before the first, None at the start

    @cached_property
    def sums(self) -> RowSums:
        return row_sums(self.p)

    @cached_property
    def common(self) -> Overlaps | None:
        return None if self.q is None else overlaps(self.p, self.q)


@dataclass(frozen=True)
class Ratio:
    """A law m beside the target's p at the tokens said."""

    log_ratio: Tensor  # [n] log m(x) - log p(x); log m(x) alone where x is outside S
    outside: Tensor  # [n] m's mass outside S


def changed(params: Sequence[Params], **fields: Any) -> list[Params]:
    """Each with these fields, made once for all rows of a request: they share their parameters."""
    made = {id(one): one for one in params}
    made = {key: replace(one, **fields) for key, one in made.items()}
    return [made[id(one)] for one in params]


def target_law(rows: Rows, params: Sequence[Params] | None = None, lag: int = 0) -> Tensor:
    """[n, V] processed probabilities, under ``params`` in place of the rows' own, or with histories ``lag`` short."""
    params = rows.params if params is None else params
    outputs = [output[: len(output) - lag] for output in rows.outputs] if lag else rows.outputs
    options = row_options(params, rows.logits.shape[-1], rows.prompts, outputs, rows.logits.device)
    return processed_probs(rows.logits.clone(), name="target", **options)


def named_ratios(rows: Rows, laws: Laws) -> Iterator[tuple[str, Ratio]]:
    """Every law by name; which ones there are depends on the parameters in use and on whether a draft is known."""
    p, q, common = laws.p, laws.q, laws.common
    chosen, top = at_tokens(p, rows.tokens), top_tokens(p)
    yield from _temperatures(rows, p)
    yield from _dropped(rows, p)
    yield "garbage temperature", _garbage(rows, p, chosen, top)
    # Divided by 0 or by NaN a row of logits is one of NaN, and the argmax of that is its first element.
    yield "garbage temperature, not a number", _one_hot(torch.zeros_like(rows.tokens), p, rows.tokens, chosen)
    yield "previous row's law", ratio(_shifted(p, laws.last, rows.previous), p, rows.tokens)
    yield "greedy verification", _one_hot(top, p, rows.tokens, chosen)
    yield "previous token again", _one_hot(rows.previous, p, rows.tokens, chosen)
    if rows.recent is not None:
        yield "a recent token again", _again(rows.recent, p, rows.tokens)
    yield "seed reuse", _one_hot(rows.twins, p, rows.tokens, chosen)
    yield "uniform noise", _uniform(p.shape[-1], chosen, laws.sums.support)
    if q is not None and common is not None:
        drafted = at_tokens(q, rows.tokens)
        yield "draft leak", Ratio(drafted.log() - _log_or_zero(chosen), common.outside)
        for name, factor, taken in zip(("lenient", "strict"), LENIENCE, common.accepted, strict=True):
            yield f"{name} acceptance", _accepted(chosen, drafted, factor, taken, common.residual)
        yield "draft's argmax leaks", _one_hot(top_tokens(q), p, rows.tokens, chosen)


def ratio(law: Tensor, p: Tensor, tokens: Tensor) -> Ratio:
    """Of any [n, V] law."""
    return Ratio(at_tokens(law, tokens).log() - _log_or_zero(at_tokens(p, tokens)), mass_outside(law, p))


def _temperatures(rows: Rows, p: Tensor) -> Iterator[tuple[str, Ratio]]:
    """Laws on p's own support: p^(1/f) normalised is temperature times f there."""
    chosen = at_tokens(p, rows.tokens).log()
    nothing = torch.zeros_like(chosen)
    for exponent, mass in zip(EXPONENTS, power_sums(p).unbind(-1), strict=True):
        at = exponent * chosen - mass.log()
        yield (
            f"temperature x{1 / exponent:.3g}",
            Ratio(torch.where(chosen > -math.inf, at - chosen, -math.inf), nothing),
        )


def _dropped(rows: Rows, p: Tensor) -> Iterator[tuple[str, Ratio]]:
    """One option forgotten at a time, computed for the rows that have it; elsewhere the law is p."""
    for name, neutral in _NEUTRAL.items():
        users = [i for i, row in enumerate(rows.params) if getattr(row, name) != neutral]
        if users:
            some = _only(rows, users)
            law = target_law(some, changed(some.params, **{name: neutral}))
            yield (
                "temperature ignored" if name == "temperature" else f"{name} dropped",
                _spread(ratio(law, p[users], some.tokens), users, len(p)),
            )
    users = [i for i, row in enumerate(rows.params) if row.penalised]
    if users:
        some = _only(rows, users)
        for name, law in (
            ("penalties dropped", target_law(some, changed(some.params, **NO_PENALTIES))),
            ("penalties one token late", target_law(some, lag=1)),
        ):
            yield name, _spread(ratio(law, p[users], some.tokens), users, len(p))


def _garbage(rows: Rows, p: Tensor, chosen: Tensor, top: Tensor) -> Ratio:
    """A temperature that is either far too low or far too high, as uninitialised memory has it: half one-hot."""
    hot = target_law(rows, changed(rows.params, temperature=_HOT))
    law = (at_tokens(hot, rows.tokens) + (top == rows.tokens).to(p.dtype)) / 2
    return Ratio(law.log() - _log_or_zero(chosen), mass_outside(hot, p) / 2)


def _accepted(chosen: Tensor, drafted: Tensor, factor: float, taken: Tensor, residual: Tensor) -> Ratio:
    """One drafted token, accepted with min(1, factor p/q); a factor nearer 1 is nearly a share of it.

    Args, [n] each: p and q of the token, the mass accepted, sum of max(p - q, 0). All of the law is on p's support.
    """
    left = (1 - taken).clamp(min=0)
    share = (chosen - drafted).clamp(min=0) / residual.clamp(min=torch.finfo(chosen.dtype).tiny)
    law = torch.where(residual > 0, torch.minimum(drafted, factor * chosen) + left * share, chosen)
    return Ratio(law.log() - _log_or_zero(chosen), torch.zeros_like(chosen))


def _only(rows: Rows, chosen: list[int]) -> Rows:
    return Rows(
        rows.logits[chosen],
        [rows.params[i] for i in chosen],
        [rows.prompts[i] for i in chosen],
        [rows.outputs[i] for i in chosen],
        rows.tokens[chosen],
        rows.previous[chosen],
        rows.twins[chosen],
        None if rows.recent is None else rows.recent[chosen],
    )


def _spread(some: Ratio, chosen: list[int], count: int) -> Ratio:
    """To [count], 0 where no row was chosen."""
    whole = [torch.zeros(count, dtype=some.outside.dtype, device=some.outside.device) for _ in range(2)]
    whole[0][chosen], whole[1][chosen] = some.log_ratio, some.outside
    return Ratio(*whole)


def _shifted(p: Tensor, last: Tensor | None, previous: Tensor) -> Tensor:
    """[n, V] each row's predecessor in its completion; the first row of a completion has itself."""
    shifted = torch.cat([p[:1] if last is None else last[None], p[:-1]])
    return torch.where((previous >= 0)[:, None], shifted, p)


def _one_hot(ids: Tensor, p: Tensor, tokens: Tensor, chosen: Tensor) -> Ratio:
    """All mass on ``ids`` [n]; the target's own law where an id is -1."""
    none = ids < 0
    hit = torch.where(ids == tokens, -_log_or_zero(chosen), -math.inf)
    outside = torch.where(none | (at_tokens(p, ids.clamp(min=0)) > 0), 0.0, 1.0)
    return Ratio(torch.where(none, 0.0, hit), outside.to(p.dtype))


def _again(recent: Tensor, p: Tensor, tokens: Tensor) -> Ratio:
    """p given that the token is one of ``recent``, which noise drawn again favours; p itself where it cannot be."""
    earlier = (recent[:, :, None] == recent[:, None, :]).tril(-1).any(-1)  # counted already
    mass = torch.where((recent >= 0) & ~earlier, p.gather(-1, recent.clamp(min=0)), 0.0).sum(-1)
    hit = (recent == tokens[:, None]).any(-1)
    at = torch.where(hit, -_log_or_zero(mass), -math.inf)
    return Ratio(torch.where(mass > 0, at, 0.0), torch.zeros_like(mass))


def _uniform(vocabulary: int, chosen: Tensor, support: Tensor) -> Ratio:
    return Ratio(-_log_or_zero(chosen) - math.log(vocabulary), 1 - support / vocabulary)


def _log_or_zero(chosen: Tensor) -> Tensor:
    return torch.where(chosen > 0, chosen, 1.0).log()


def at_tokens(law: Tensor, tokens: Tensor) -> Tensor:
    """[n, V] and [n] ids -> [n]."""
    return law.gather(-1, tokens[:, None])[:, 0]


def draft_law(rows: Rows, logits: Tensor) -> Tensor:
    """[n, V] the draft's processed probabilities, padded or cut to the target's vocabulary."""
    vocabulary = rows.logits.shape[-1]
    fitted = torch.full((len(logits), vocabulary), -torch.inf, dtype=logits.dtype, device=logits.device)
    width = min(vocabulary, logits.shape[-1])
    fitted[:, :width] = logits[:, :width]
    options = row_options(rows.params, vocabulary, rows.prompts, rows.outputs, logits.device)
    shaping = {name: options.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in options}
    scores = adjusted_logits(fitted, **options)
    lost = ~scores.amax(-1).isfinite()  # a mask that leaves this draft nothing
    scores[lost] = 0.0
    return processed_probs(scores, name="draft", check=False, **shaping)
