"""The figures as one self-contained page of plots."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from spec.bench.plan import SERVED
from spec.bench.results import ALL
from spec.bench.tables import limits, percent, setting, with_error
from spec.pages import charts, page
from spec.pages.charts import Series
from spec.pages.dots import Dot, dot_chart
from spec.pages.numbers import duration, number

Json = Mapping[str, Any]

COUNTED = len(SERVED)  # palette index; the ways of serving have those before it
COLOUR: dict[str, int] = {name: index for index, name in enumerate(SERVED)}


def render(found: Json) -> str:
    """The page, from what ``--json`` writes alone: the same figures give the same bytes."""
    title = f"{_name(found['draft'])} drafts for {_name(found['target'])}"
    body = [
        f'<header><p class="kicker">Acceptance benchmark</p><h1>{escape(title)}</h1>'
        f'<p class="headline">{escape(headline(found))}</p>{_tiles(found)}</header>',
        _positions(found), _speedups(found), _rates(found), _table(found), _details(found),
    ]  # fmt: skip
    return page.page(title, "\n".join(filter(None, body)))


def headline(found: Json) -> str:
    """What it comes to, in a sentence or two made of the figures."""
    last = found["speedup"][-1]
    parts = []
    for row in found["acceptance"]:
        if (setting(row), row["mode"], row["category"]) == (setting(last), last["mode"], ALL):
            tokens = number(row["tokens_per_step"]["mean"])
            parts.append(f"At {setting(row)} a target step yields {tokens} tokens of {last['draft_length']} drafted.")
    if last["measured"] is not None:
        parts.append(f"That is {limits(last)} times the speed of plain decoding here.")
    best = found["best_draft_length"]
    parts.append(f"The best draft length on this machine is {best}." if best else "On this machine drafts do not pay.")
    return " ".join(parts)


def _tiles(found: Json) -> str:
    entries = [("Prompts", f"{found['prompts']:,}"), ("Cost ratio c", number(found["cost_ratio"]))]
    entries += [("Best draft length", str(found["best_draft_length"])), ("Time", duration(found["seconds"]))]
    return page.tiles(entries)


def _positions(found: Json) -> str:
    """A chart a setting: the share of drafts that keep each position, expected and counted."""
    drawn = []
    for counted in found["counted"]:
        if counted["category"] != ALL:
            continue
        where = setting(counted)
        series = [
            Series(row["mode"], _points(row["per_position"]), COLOUR[row["mode"]])
            for row in found["acceptance"]
            if setting(row) == where and row["category"] == ALL
        ]
        shares = counted["per_position"]
        series.append(
            Series("counted", _points([s["mean"] for s in shares]), COUNTED, [_limits(s) for s in shares])
        )  # fmt: skip
        chart = charts.line_chart(series, title=where, unit="share of drafts", across="position", zero=True)
        drawn.append(page.figure(where, chart) if chart else "")
    served = found["plan"]["served"]
    legend = page.legend([*((f"expected, {name}", COLOUR[name]) for name in SERVED), (f"counted, {served}", COUNTED)])
    hint = "How many drafts keep their token at a position and all before it; whiskers are 95 % intervals."
    return _section("Acceptance by position", hint, f'{legend}<div class="grid-of">{"".join(drawn)}</div>')


def _speedups(found: Json) -> str:
    """A chart a setting: predicted speed-up by draft length, and the measured one."""
    drawn = []
    for lengths, speedup in zip(found["draft_lengths"], found["speedup"], strict=True):
        points = [(float(at["length"]), at["speedup"]) for at in lengths["lengths"]]
        series = [Series("predicted", points, COLOUR[lengths["mode"]])]
        if speedup["measured"] is not None:
            at = float(speedup["draft_length"])
            series.append(Series("measured", [(at, speedup["measured"])], COUNTED, [_limits(speedup)]))
        chart = charts.line_chart(
            series, title=setting(lengths), unit="times plain", across="draft length", bound=("plain", 1.0), zero=True
        )
        drawn.append(page.figure(f"{setting(lengths)}: best {lengths['best']}", chart))
    legend = page.legend([("predicted", COLOUR[found["plan"]["served"]]), ("measured", COUNTED)])
    hint = "Expected tokens of a step over its measured cost, batch 1."
    return _section("Speed-up by draft length", hint, f'{legend}<div class="grid-of">{"".join(drawn)}</div>')


def _rates(found: Json) -> str:
    """Acceptance of a token by setting, and by category where there are any."""
    parts = []
    categories = list(dict.fromkeys(row["category"] for row in found["acceptance"]))
    by_setting = [_dot(setting(row), row) for row in _sorted(found, ALL)]
    parts.append(_dots("All prompts", by_setting))
    for where in dict.fromkeys(setting(row) for row in found["acceptance"]) if len(categories) > 1 else ():
        rows = [row for name in categories for row in _sorted(found, name) if setting(row) == where]
        parts.append(_dots(where, [_dot(row["category"], row) for row in rows]))
    legend = page.legend(list(COLOUR.items()))
    hint = (
        "Of a drafted token, at every prefix of the target's text; for block verification, the rate that token-wise "
        "verification would need to accept as many. 95 % intervals, prompts as clusters."
    )
    return _section("Expected acceptance", hint, legend + "".join(parts))


def _table(found: Json) -> str:
    head = ["Setting", "served", "tokens a step", "by position", "plain tok/s", "spec. tok/s", "speed-up", "predicted"]
    counted = {setting(row): row for row in found["counted"] if row["category"] == ALL}
    rows = []
    for row in found["speedup"]:
        steps = counted[setting(row)]
        shares = " ".join(percent(share["mean"]) for share in steps["per_position"])
        cells = [with_error(steps["tokens_per_step"]), shares, number(row["plain_tok_s"]), number(row["spec_tok_s"])]
        rows.append(page.row(escape(setting(row)), [row["mode"]], [*cells, limits(row), f"{row['predicted']:.2f}"]))
    table = page.table(head, [f"<tbody>{''.join(rows)}</tbody>"], 2)
    return _section("Counted and timed", "What the engine did, batch 1 for the times.", table)


def _details(found: Json) -> str:
    chosen = {"plan": found["plan"], "provenance": found["provenance"]}
    text = escape(json.dumps(chosen, indent=1))
    return f"<details><summary>What produced this</summary><pre>{text}</pre></details>"


def _sorted(found: Json, category: str) -> list[Json]:
    return sorted((row for row in found["acceptance"] if row["category"] == category), key=setting)


def _dot(label: str, row: Json) -> Dot:
    low, high = _limits(row)
    mean = row["mean"]
    return Dot(label, mean, low if math.isfinite(low) else mean, high if math.isfinite(high) else mean,
               COLOUR[row["mode"]], row["mode"])  # fmt: skip


def _dots(title: str, dots: Sequence[Dot]) -> str:
    chart = dot_chart(dots, title=title, unit="acceptance")
    return page.figure(title, chart, wide=True) if chart else ""


def _section(title: str, hint: str, content: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p class="hint">{escape(hint)}</p>{content}</section>'


def _points(values: Sequence[float | None]) -> list[tuple[float, float]]:
    return [(float(i), math.nan if value is None else value) for i, value in enumerate(values, 1)]


def _limits(interval: Json) -> tuple[float, float]:
    return tuple(math.nan if interval[name] is None else float(interval[name]) for name in ("lo", "hi"))  # type: ignore[return-value]


def _name(model: str) -> str:
    """The last part of a path or hub id."""
    return model.rstrip("/").rpartition("/")[2]
