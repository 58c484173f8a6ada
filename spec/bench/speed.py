"""Plain against speculative decoding by the same engine, at batch 1, prompt after prompt in turns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from spec import stats
from spec.bench.counting import verification
from spec.bench.plan import Plan, Setting
from spec.bench.prompts import Prompt
from spec.drafters.base import Drafter
from spec.engine import Engine
from spec.models.base import LanguageModel
from spec.request import Request


@dataclass(frozen=True)
class Speed:
    """Tokens after each text's first step, which waits for the prompt, and the seconds they took."""

    plain_tok_s: float
    spec_tok_s: float
    speedup: stats.Interval  # prompts as clusters


def measure(
    target: LanguageModel,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    setting: Setting,
    plan: Plan,
    end_tokens: Collection[int],
    advance: Callable[[], None] = lambda: None,
) -> Speed | None:
    """Each prompt is decoded plainly and with drafts, every second one the other way round. One warm-up.

    None where every text ended within its first step. The two texts of a prompt differ at temperatures above 0.
    """
    ends = tuple(end_tokens)
    plain = Engine(target, draft_length=0, end_tokens=ends)
    quick = Engine(target, drafter, draft_length=plan.draft_length, mode=verification(plan), end_tokens=ends)
    for engine in (plain, quick):
        _decode(engine, prompts[0], setting, plan, 0)
    taken: dict[Engine, list[tuple[float, float]]] = {plain: [], quick: []}
    for i, prompt in enumerate(prompts):
        for engine in (plain, quick) if i % 2 == 0 else (quick, plain):
            taken[engine].append(_decode(engine, prompt, setting, plan, i))
        advance()
    both = [(*a, *b) for a, b in zip(taken[quick], taken[plain], strict=True) if a[0] and b[0]]
    if not both:
        return None
    spec_tokens, spec_seconds, plain_tokens, plain_seconds = (list(column) for column in zip(*both, strict=True))
    return Speed(
        sum(plain_tokens) / sum(plain_seconds),
        sum(spec_tokens) / sum(spec_seconds),
        stats.ratio_of_rates(spec_tokens, spec_seconds, plain_tokens, plain_seconds),
    )


def _decode(engine: Engine, prompt: Prompt, setting: Setting, plan: Plan, index: int) -> tuple[float, float]:
    """Tokens after the first step, and their seconds."""
    request = Request(prompt.token_ids, setting.params(plan.seed + index), plan.max_tokens)
    result = engine.generate([request])[0]
    completion = result.completions[0]
    if completion.error is not None:
        raise ValueError(completion.error)
    first_step = next(
        (i for i, drafted in enumerate(completion.from_draft, 1) if not drafted), len(completion.token_ids)
    )
    rest = len(completion.token_ids) - first_step
    return float(rest), result.seconds - (result.seconds_to_first_token or 0.0)
