"""The figures as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spec.bench.results import ALL
from spec.pages.numbers import duration, number

Json = Mapping[str, Any]


def show(found: Json) -> None:
    """Prints everything to stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, 100)
    skipped = f", {found['skipped_too_long']} left out as too long" if found["skipped_too_long"] else ""
    console.print(f"{found['prompts']} prompts of {found['data']}{skipped}, {duration(found['seconds'])}")
    for table in (acceptance(found), counted(found), speed(found)):
        console.print(table)
    served, length = found["plan"]["served"], found["best_draft_length"]
    advice = f"draft {length} tokens a step" if length else "do not draft: it costs more than it brings"
    console.print(f"cost ratio c = {number(found['cost_ratio'])} (a draft step / a target step)")
    console.print(f"best on this machine ({served} drafts): {advice}")


def acceptance(found: Json) -> Any:
    """A row a setting and category, a column a way of serving."""
    rows: dict[tuple[str, str], dict[str, Json]] = {}
    for row in found["acceptance"]:
        rows.setdefault((setting(row), row["category"]), {})[row["mode"]] = row
    table = _table("Expected acceptance of a drafted token", "setting", "category", "greedy", "probabilistic", "block")
    table.caption = (
        "block: the rate that token-wise verification would need; ± half a 95 % interval, prompts as clusters"
    )
    for (where, category), modes in rows.items():
        cells = (with_error(modes[mode]) if mode in modes else "–" for mode in ("greedy", "probabilistic", "block"))
        table.add_row(where if category == ALL else "", category, *cells)
    return table


def counted(found: Json) -> Any:
    """Counted beside expected, over all prompts."""
    names = ("setting", "tokens a step", "expected", "accepted by position", "of those that got there")
    table = _table(f"Counted, {found['plan']['served']} drafts of {found['plan']['draft_length']}", *names)
    expected = {(setting(row), row["mode"], row["category"]): row for row in found["acceptance"]}
    for row in found["counted"]:
        if row["category"] != ALL:
            continue
        other = expected.get((setting(row), row["mode"], ALL))
        table.add_row(
            setting(row),
            with_error(row["tokens_per_step"]),
            with_error(other["tokens_per_step"]) if other else "–",
            " ".join(percent(share["mean"]) for share in row["per_position"]),
            " ".join(percent(share["mean"]) for share in row["conditional"]),
        )
    return table


def speed(found: Json) -> Any:
    """Measured beside predicted, and the best draft length."""
    names = ("setting", "plain tok/s", "spec. tok/s", "speed-up", "predicted", "best K", "there")
    table = _table(f"Speed at batch 1, draft length {found['plan']['draft_length']}", *names)
    for row, lengths in zip(found["speedup"], found["draft_lengths"], strict=True):
        best = lengths["best"]
        table.add_row(
            setting(row), number(row["plain_tok_s"]), number(row["spec_tok_s"]), limits(row),
            f"{row['predicted']:.2f}", str(best), f"{lengths['lengths'][best]['speedup']:.2f}",
        )  # fmt: skip
    return table


def setting(row: Json) -> str:
    """How a point of the grid is called."""
    return "T=0" if row["temperature"] == 0 else f"T={row['temperature']:g}, top-p {row['top_p']:g}"


def with_error(interval: Json) -> str:
    """0.412 ± 0.031: half of the interval; of a single prompt, which has none, the mean alone."""
    if interval["mean"] is None:
        return "–"
    if interval["lo"] is None or interval["hi"] is None or interval.get("prompts") == 1:
        return f"{interval['mean']:.3f}"
    return f"{interval['mean']:.3f} ± {(interval['hi'] - interval['lo']) / 2:.3f}"


def limits(row: Json) -> str:
    """1.84 (1.71–1.98)."""
    if row["measured"] is None:
        return "–"
    between = "" if row["hi"] is None else f" ({row['lo']:.2f}–{row['hi']:.2f})"
    return f"{row['measured']:.2f}{between}"


def percent(share: float | None) -> str:
    """41%, or an en dash."""
    return "–" if share is None else f"{share:.0%}"


def _table(title: str, *columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in ("setting", "category") else "right", no_wrap=True)
    return table
