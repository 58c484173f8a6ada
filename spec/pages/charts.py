"""Charts as inline SVG: plain strings, no library. Colours come from the page's style sheet (classes ``s0``, ``s1`` …).

Every function returns one well-formed ``<svg>`` with ``role="img"`` and a text equivalent in ``aria-label``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

from spec.pages.numbers import number

WIDTH, HEIGHT = 360, 210  # of a line chart, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 36  # margins that hold tick labels and axis titles
MAX_POINTS = 400  # drawn for each line

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line. Points with a value that is not finite leave a gap."""

    name: str
    points: Sequence[Point]
    colour: int = 0  # index of the style sheet's palette
    limits: Sequence[tuple[float, float]] = ()  # of each point, drawn as a whisker; empty: none


@dataclass(frozen=True)
class Scale:
    """Data to drawing units, along one axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True)
class Bar:
    """One stacked horizontal bar: (name, value, palette index) of each segment."""

    label: str
    segments: Sequence[tuple[str, float, int]] = field(default_factory=tuple)

    @property
    def total(self) -> float:
        return sum(value for _, value, _ in self.segments)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high, low = low + (abs(low) * 0.1 or 1.0), low - (abs(low) * 0.1 or 1.0)
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover [low, high], and 2 and 5 times them where the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    values = [m * 10.0**e for e in range(first, last + 1) for m in factors]
    start = max(v for v in values if v <= low * (1 + 1e-9))
    stop = min((v for v in values if v >= high * (1 - 1e-9) and v > start), default=10 * start)
    return [v for v in values if start <= v <= stop] if stop in values else [start, stop]


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most about ``limit`` points: lowest and highest of each run of neighbours, so that spikes stay visible."""
    if len(points) <= limit:
        return list(points)
    size = -(-2 * len(points) // limit)
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), size):
        chunk = [i for i in range(start, min(start + size, len(points))) if math.isfinite(points[i][1])]
        if chunk:
            kept |= {min(chunk, key=lambda i: points[i][1]), max(chunk, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    unit: str,
    across: str = "step",
    bound: tuple[str, float] | None = None,
    log: bool = False,
    zero: bool = False,
) -> str:
    """Values over steps, or what ``across`` names; "" without any value.

    ``bound`` is a named horizontal limit; ``zero`` starts the axis at 0. On a logarithmic axis values that are not
    positive are left out.
    """
    usable = [replace(s, points=[p if _drawable(p[1], log) else (p[0], math.nan) for p in s.points]) for s in series]
    finite = [p for s in usable for p in s.points if math.isfinite(p[1])]
    if not finite:
        return ""
    values = [y for _, y in finite] + ([bound[1]] if bound else []) + ([0.0] if zero else [])
    values += [limit for s in usable for pair in s.limits for limit in pair if _drawable(limit, log)]
    y_ticks = log_ticks(min(values), max(values)) if log else ticks(min(values), max(values))
    steps = [x for x, _ in finite]
    x_ticks = [t for t in ticks(min(steps), max(steps)) if min(steps) <= t <= max(steps) and t == int(t)]
    x = Scale(min(steps), max(steps), LEFT + 4, WIDTH - RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP, log)
    parts = [_axes(x, y, x_ticks or [steps[0]], y_ticks, unit, across)]
    if bound:
        parts.append(_bound(y, *bound))
    parts += [whisker(s.colour, x(p[0]), y, pair) for s in usable for p, pair in zip(s.points, s.limits, strict=False)]
    parts += [_line(s, x, y, unit, across) for s in usable]
    return svg(WIDTH, HEIGHT, f"{title}: {describe(usable, unit, across)}", "".join(parts))


def describe(series: Sequence[Series], unit: str, across: str = "step") -> str:
    """A chart in words, for those who do not see it."""
    texts = []
    for one in series:
        points = [p for p in one.points if math.isfinite(p[1])]
        if not points:
            continue
        (first, before), (last, after) = points[0], points[-1]
        low, high = min(y for _, y in points), max(y for _, y in points)
        name = f"{one.name} " if len(series) > 1 else ""
        texts.append(
            f"{name}{number(before)} at {across} {first:g}, {number(after)} at {across} {last:g}, "
            f"lowest {number(low)}, highest {number(high)} {unit}"
        )
    return "; ".join(texts)


def stacked_bars(bars: Sequence[Bar], *, title: str, unit: str) -> str:
    """One horizontal bar for each entry, all on one scale that starts at 0. "" when there is nothing to show."""
    longest = max((bar.total for bar in bars), default=0.0)
    if not longest > 0:
        return ""
    width, left, row, bottom = 760, 120, 44, 40
    height = row * len(bars) + bottom
    marks = ticks(0, longest, 7)
    x = Scale(0, marks[-1], left, width - 60)
    floor = height - bottom
    parts = [f'<line class="grid" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="4" y2="{floor}"/>'
             f'<text class="tick" x="{x(t):.1f}" y="{floor + 15}" text-anchor="middle">{number_tick(t)}</text>'
             for t in marks]  # fmt: skip
    parts.append(
        f'<text class="axis" x="{(left + width - 60) / 2}" y="{height - 6}" text-anchor="middle">{escape(unit)}</text>'
    )
    for index, bar in enumerate(bars):
        parts.append(_stack(bar, x, 8 + row * index, row - 16, unit))
    words = "; ".join(
        f"{bar.label}: " + ", ".join(f"{name} {number(value)}" for name, value, _ in bar.segments) for bar in bars
    )
    return svg(width, height, f"{title}, {unit}: {words}", "".join(parts), "bars")


def number_tick(value: float) -> str:
    """A tick's label: as few digits as tell it apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _drawable(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def svg(width: int, height: int, words: str, body: str, kind: str = "line") -> str:
    """The whole image; ``words`` is its text equivalent."""
    return (
        f'<svg class="chart {kind}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(words)}">{body}</svg>'
    )


def _axes(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], unit: str, across: str) -> str:
    parts = []
    for t in y_ticks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y(t) + 3.5:.1f}" text-anchor="end">{number_tick(t)}</text>'
        )
    floor = HEIGHT - BOTTOM
    for t in x_ticks:
        parts.append(
            f'<line class="base" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{floor}" y2="{floor + 4}"/>'
            f'<text class="tick" x="{x(t):.1f}" y="{floor + 15}" text-anchor="middle">{number_tick(t)}</text>'
        )
    middle, center = (TOP + floor) / 2, (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>'
        f'<text class="axis" x="{center}" y="{HEIGHT - 4}" text-anchor="middle">{escape(across)}</text>'
        f'<text class="axis" transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">{escape(unit)}</text>'
    )
    return "".join(parts)


def _bound(y: Scale, name: str, value: float) -> str:
    at = y(value)
    below = at < TOP + 16
    return (
        f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="note" x="{WIDTH - RIGHT}" y="{at + (12 if below else -4):.1f}" text-anchor="end">'
        f"{escape(name)} {number_tick(value)}</text>"
    )


def whisker(colour: int, across: float, y: Scale, limits: tuple[float, float]) -> str:
    """An interval as a line through the point at drawing unit ``across``; "" where a limit is not finite."""
    if not all(math.isfinite(limit) for limit in limits):
        return ""
    low, high = (y(limit) for limit in limits)
    return f'<polyline class="s{colour}" points="{across:.1f},{low:.1f} {across:.1f},{high:.1f}"/>'


def _line(series: Series, x: Scale, y: Scale, unit: str, across: str) -> str:
    """Unbroken pieces as polylines, and a dot with a hover title at every point."""
    pieces: list[list[Point]] = [[]]
    for point in thin(series.points):
        if math.isfinite(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    parts = [
        f'<polyline class="s{series.colour}" points="{" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in piece)}"/>'
        for piece in pieces
        if len(piece) > 1
    ]
    lone = {piece[0] for piece in pieces if len(piece) == 1}
    for a, b in (point for piece in pieces for point in piece):
        words = escape(f"{series.name}, {across} {a:g}: {number(b)} {unit}")
        shown = (
            f'<circle class="dot s{series.colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{3 if (a, b) in lone else 2}"/>'
        )
        hit = f'<circle class="hit" cx="{x(a):.1f}" cy="{y(b):.1f}" r="7"/>'
        parts.append(f'<g class="point"><title>{words}</title>{hit}{shown}</g>')
    return "".join(parts)


def _stack(bar: Bar, x: Scale, top: float, thickness: float, unit: str) -> str:
    middle = top + thickness / 2 + 4
    parts = [f'<text class="label" x="112" y="{middle}" text-anchor="end">{escape(bar.label)}</text>']
    so_far = 0.0
    for name, value, colour in bar.segments:
        left, right = x(so_far), x(so_far + value)
        so_far += value
        share = value / bar.total if bar.total else 0.0
        words = escape(f"{bar.label}, {name}: {number(value)} {unit} ({share:.0%})")
        parts.append(
            f'<g class="point"><title>{words}</title><rect class="s{colour}" x="{left:.1f}" y="{top}" '
            f'width="{max(right - left, 0):.1f}" height="{thickness}"/></g>'
        )
    parts.append(f'<text class="label" x="{x(so_far) + 6:.1f}" y="{middle}">{number(bar.total)}</text>')
    return "".join(parts)
