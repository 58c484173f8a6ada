"""A chart of means with their intervals, one line each: what error bars are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from spec.pages.charts import Scale, number_tick, svg, ticks
from spec.pages.numbers import number

WIDTH, LEFT, RIGHT, ROW, BOTTOM = 760, 210, 60, 26, 40


@dataclass(frozen=True)
class Dot:
    """A mean and its limits (equal to it where there are none)."""

    label: str
    mean: float
    low: float
    high: float
    colour: int = 0  # index of the style sheet's palette
    name: str = ""  # of the colour, for the hover title


def dot_chart(dots: Sequence[Dot], *, title: str, unit: str) -> str:
    """Horizontal intervals on one scale that starts at 0; a label that repeats the one before is not written again.

    "" without dots.
    """
    if not dots:
        return ""
    height = ROW * len(dots) + BOTTOM
    marks = ticks(0, max(1e-3, *(dot.high for dot in dots)), 6)
    x = Scale(0, marks[-1], LEFT, WIDTH - RIGHT)
    floor = height - BOTTOM
    parts = [
        f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="4" y2="{floor}"/>'
        f'<text class="tick" x="{x(t):.1f}" y="{floor + 15}" text-anchor="middle">{number_tick(t)}</text>'
        for t in marks
    ]
    center = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{center}" y="{height - 6}" text-anchor="middle">{escape(unit)}</text>')
    before = ""
    for i, dot in enumerate(dots):
        parts.append(_row(dot, x, 4 + ROW * i + ROW / 2, dot.label != before, unit))
        before = dot.label
    words = "; ".join(f"{dot.label} {dot.name} {number(dot.mean)}".replace("  ", " ") for dot in dots)
    return svg(WIDTH, height, f"{title}, {unit}: {words}", "".join(parts), "bars")


def _row(dot: Dot, x: Scale, y: float, labelled: bool, unit: str) -> str:
    label = f'<text class="label" x="{LEFT - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(dot.label)}</text>'
    words = escape(
        f"{dot.label} {dot.name}: {number(dot.mean)} ({number(dot.low)} to {number(dot.high)}) {unit}".replace(
            "  ", " "
        )
    )
    return (label if labelled else "") + (
        f'<g class="point"><title>{words}</title>'
        f'<polyline class="s{dot.colour}" points="{x(dot.low):.1f},{y:.1f} {x(dot.high):.1f},{y:.1f}"/>'
        f'<circle class="dot s{dot.colour}" cx="{x(dot.mean):.1f}" cy="{y:.1f}" r="4"/></g>'
        f'<text class="label" x="{x(dot.high) + 8:.1f}" y="{y + 4:.1f}">{number(dot.mean)}</text>'
    )
