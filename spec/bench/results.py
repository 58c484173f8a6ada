"""What ``--json`` writes: plain data, from which the table and the page are made too.

Numbers that are not there (a position that no draft reached, a speed-up's upper limit with a single prompt) are None.
A single prompt says nothing about others: the limits of its shares are the ends of the range, 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from spec.bench import figures
from spec.bench.costs import overall_ratio
from spec.bench.plan import SERVED, Plan
from spec.bench.run import Measured
from spec.stats import Interval

ALL = "all"  # the category that every prompt is in
Json = dict[str, Any]


def results(measured: Sequence[Measured], plan: Plan, categories: Sequence[str]) -> Json:
    """Every figure. ``acceptance`` is expected, ``counted`` is what the engine did; see :mod:`spec.bench.figures`."""
    curves = [
        figures.speedup_curve(m.expected, plan.served, m.drafter(plan.served), m.costs) for m in measured
    ]  # at each setting
    groups = [ALL, *categories]
    return {
        "acceptance": [row for m in measured for row in _acceptance(m, plan, groups)],
        "counted": [row for m in measured for row in _counted(m, plan, groups)],
        "cost_ratio": overall_ratio([m.costs for m in measured]),
        "best_draft_length": figures.best_length(curves),
        "speedup": [_speedup(m, plan, curve) for m, curve in zip(measured, curves, strict=True)],
        "draft_lengths": [_lengths(m, plan, curve) for m, curve in zip(measured, curves, strict=True)],
        "plan": _plain(asdict(plan)),
    }


def _point(m: Measured) -> Json:
    return {"temperature": m.setting.temperature, "top_p": m.setting.top_p}


def _acceptance(m: Measured, plan: Plan, groups: Sequence[str]) -> list[Json]:
    rows: list[Json] = []
    for served in SERVED:
        for group in groups:
            texts = [text for text in m.expected if _within(text.text.prompt.category, group)]
            row = figures.expected_row(texts, served, m.drafter(served), plan.draft_length) if texts else None
            if row is None:
                continue
            rows.append(
                {
                    **_point(m), "mode": served, "category": group, **_interval(row.acceptance),
                    "per_position": _plain(row.unconditional), "conditional": _plain(row.conditional),
                    "tokens_per_step": _interval(row.tokens_per_step), "positions": row.positions, "steps": row.steps,
                    "prompts": row.acceptance.clusters,
                }
            )  # fmt: skip
    return rows


def _counted(m: Measured, plan: Plan, groups: Sequence[str]) -> list[Json]:
    rows: list[Json] = []
    for group in groups:
        texts = [text for text in m.texts if _within(text.prompt.category, group)]
        expected = [text for text in m.expected if _within(text.text.prompt.category, group)]
        if not texts:
            continue
        row, drafter = figures.counted_row(texts, plan.draft_length), m.drafter(plan.served)
        tried = any(text.trials[drafter] for text in expected)
        gap = figures.disagreement(expected, plan.served, drafter, plan.draft_length) if tried else None
        rows.append(
            {
                **_point(m), "mode": plan.served, "category": group, "tokens_per_step": _interval(row.tokens_per_step),
                "per_position": [_interval(i) for i in row.unconditional],
                "conditional": [_interval(i) for i in row.conditional],
                "counted_less_expected": _interval(gap), "steps": row.steps, "prompts": len(texts),
            }
        )  # fmt: skip
    return rows


def _speedup(m: Measured, plan: Plan, curve: Sequence[tuple[float, float]]) -> Json:
    fast = m.speed
    measured = _interval(None if fast is None else fast.speedup)
    return {
        **_point(m), "mode": plan.served, "draft_length": plan.draft_length,
        "measured": measured["mean"], "lo": measured["lo"], "hi": measured["hi"],
        "predicted": curve[plan.draft_length][1],
        "plain_tok_s": None if fast is None else fast.plain_tok_s,
        "spec_tok_s": None if fast is None else fast.spec_tok_s,
    }  # fmt: skip


def _lengths(m: Measured, plan: Plan, curve: Sequence[tuple[float, float]]) -> Json:
    points = [
        {"length": length, "tokens_per_step": tokens, "speedup": speedup, "draft_s": draft, "target_s": target}
        for length, ((tokens, speedup), draft, target) in enumerate(
            zip(curve, m.costs.draft, m.costs.target, strict=True)
        )
    ]
    best = figures.best_length([curve])
    return {**_point(m), "mode": plan.served, "best": best, "cost_ratio": m.costs.ratio, "lengths": points}


def _within(category: str | None, group: str) -> bool:
    return group in (ALL, category)


def _interval(interval: Interval | None) -> Json:
    values = (math.nan,) * 3 if interval is None else (interval.mean, interval.lo, interval.hi)
    return dict(zip(("mean", "lo", "hi"), _plain(values), strict=True))


def _plain(value: Any) -> Any:
    """As JSON has it: lists, and None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
