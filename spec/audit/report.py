"""A verdict for people: a table for terminals, and one HTML file that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from spec.audit.verdict import Verdict

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH, _HEIGHT = 560, 160


def rows(verdict: Verdict) -> list[tuple[str, str]]:
    """What both show, name and value."""
    found = [("engine", verdict.engine), ("mode", verdict.mode), ("tokens", f"{verdict.tokens:,}")]
    if verdict.delta:
        found.append(("level δ", f"{verdict.delta:g}"))
    if verdict.epsilon is not None:
        found.append(("bound ε on a shift, a token", f"{verdict.epsilon:.3%} (wanted {verdict.wanted_epsilon:.3%})"))
    if verdict.fault is not None:
        named = {**verdict.fault.parameters, **{f"most in {k}": v for k, v in verdict.fault.where.items()}}
        found.append(("fault", verdict.fault.name))
        found += [(f"  {name}", f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in
                  named.items()]  # fmt: skip
    if "log10_e" in verdict.tests:
        found.append(
            ("evidence, log10 e", f"{verdict.tests['log10_e']:.2f} (different from {-_log10(verdict.delta):.0f})")
        )
    for name, value in (verdict.floor or {}).items():
        found.append((f"floor, {name}", f"{value:.4g}"))
    for name, direction in verdict.tests.get("directions", {}).items():
        found.append((name, f"expected {direction['expected']:.2%}, shift {direction['shift']:+.3%}"))
    for name, law in verdict.tests.get("excluded", {}).items():
        found.append((f"excluded: {name}", f"a share from {law['share']:.1%}, total variation {law['distance']:.2%}"))
    for name, score in verdict.tests.get("standard", {}).items():
        found.append((f"{name}, score", f"{score:.2f}"))
    for name in ("p", "mmd2", "ties", "largest_gap", "tie", "gaps", "tolerance", "logprob_gap"):
        if verdict.tests.get(name) is not None:
            found.append((name, str(verdict.tests[name])))
    if verdict.tests.get("left_out"):
        found.append(("answers left out, hence undecided", str(verdict.tests["left_out"])))
    found += [(f"seconds of {name}", f"{value:.1f}") for name, value in verdict.seconds.items()]
    return found


def table(verdict: Verdict) -> Table:
    """For rich."""
    from rich.table import Table

    shown = Table(title=verdict.sentence(), show_header=False)
    for name, value in rows(verdict):
        shown.add_row(name, value)
    return shown


def page(verdicts: Sequence[Verdict]) -> str:
    """HTML with the PIT histograms and the path of the e-process of every verdict."""
    parts = [_section(verdict) for verdict in verdicts]
    return _PAGE.format(body="\n".join(parts))


def _section(verdict: Verdict) -> str:
    cells = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in rows(verdict))
    figures = [_histogram(name, counts) for name, counts in verdict.histograms.items() if counts]
    if len(verdict.path) > 1:
        figures.append(_path(verdict.path, -_log10(verdict.delta)))
    return (
        f'<section class="{verdict.verdict}"><h2>{html.escape(verdict.engine)}: {html.escape(verdict.sentence())}</h2>'
        f"<table>{cells}</table>{''.join(figures)}</section>"
    )


def _histogram(name: str, counts: Sequence[int]) -> str:
    """Bars around the expected height, with three standard deviations in grey."""
    expected = sum(counts) / len(counts)
    top = max(max(counts), expected + 3 * math.sqrt(expected)) * 1.05
    width = _WIDTH / len(counts)

    def y(value: float) -> float:
        return _HEIGHT * (1 - value / top)

    low, high = max(expected - 3 * math.sqrt(expected), 0), expected + 3 * math.sqrt(expected)
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{y(c):.1f}" width="{width - 1:.1f}" height="{_HEIGHT - y(c):.1f}" class="bar"/>'
        for i, c in enumerate(counts)
    )
    band = f'<rect x="0" y="{y(high):.1f}" width="{_WIDTH}" height="{y(low) - y(high):.1f}" class="band"/>'
    return _figure(f"Histogram of the {name}; grey: expected ± 3 standard deviations", bars + band)


def _path(path: Sequence[tuple[int, float]], level: float) -> str:
    values = [value for _, value in path]
    low, high = min(min(values), -1.0), max(min(max(values), 4 * level), level * 1.1)
    last = max(path[-1][0], 1)

    def point(tokens: int, value: float) -> str:
        return f"{_WIDTH * tokens / last:.1f},{_HEIGHT * (high - min(value, high)) / (high - low):.1f}"

    step = max(len(path) // 500, 1)
    line = " ".join(point(*look) for look in [*path[::step], path[-1]])
    at = _HEIGHT * (high - level) / (high - low)
    return _figure(
        f"log10 of the e-process over {last:,} tokens; above the line the engine is different",
        f'<line x1="0" x2="{_WIDTH}" y1="{at:.1f}" y2="{at:.1f}" class="level"/>'
        f'<polyline points="{line}" class="path"/>',
    )


def _figure(title: str, content: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">{content}</svg>'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _log10(delta: float) -> float:
    return math.log10(delta) if delta > 0 else 0.0


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Audit</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b }}
h2 {{ font-size: 1.1rem }} th {{ text-align: left; font-weight: normal; padding-right: 2rem; color: #555 }}
section {{ border-left: 4px solid #888; padding-left: 1rem; margin: 2rem 0 }}
section.equivalent {{ border-color: #2a7d3f }} section.different {{ border-color: #b3261e }}
svg {{ width: 100%; border-bottom: 1px solid #888 }} figcaption {{ color: #555; font-size: .85rem }}
.bar {{ fill: #4477aa }} .band {{ fill: #0003 }} .level {{ stroke: #b3261e }} .path {{ fill: none; stroke: #4477aa }}
</style></head><body><h1>Is the output distributed as the target's?</h1>
{body}
</body></html>
"""
