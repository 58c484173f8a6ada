"""Figures for people."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """A figure for people: 0.4312, 3.142, 41.3, 12,345; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e9:
        return f"{value:.3g}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 3
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}"


def duration(seconds: float | None) -> str:
    """42.0 s, 7 min 05 s, 3 h 12 min."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
