"""What the held-out figures mean, in words: one definition for the report, the model card and whoever prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from spec.pages.numbers import duration as duration
from spec.pages.numbers import number as number

ON_STUDENT = "_on_student"  # suffix of figures measured on prefixes the student visits
LABELS = {"start": "start", "after_warm_start": "after warm start", "end": "end"}  # in the order of the run
Heldout = Mapping[str, Mapping[str, float]]  # label -> metric -> value, as in summary.json


@dataclass(frozen=True)
class Figure:
    """One metric of ``summary["heldout"]``."""

    key: str
    title: str
    unit: str
    better: str  # "higher" or "lower"
    meaning: str


FIGURES = (
    Figure("reverse_kl", "Reverse KL", "nats per token", "lower",
           "KL(student ‖ teacher): how much the student puts where its teacher puts nothing."),
    Figure("forward_kl", "Forward KL", "nats per token", "lower",
           "KL(teacher ‖ student): how much of its teacher the student misses."),
    Figure("acceptance_t1", "Acceptance at T=1", "share of tokens", "higher",
           "Sampled draft tokens that lossless speculative decoding keeps: the sum of min(p, q)."),
    Figure("acceptance_t0", "Acceptance at T=0", "share of tokens", "higher",
           "Greedy draft tokens it keeps: both models have the same most likely token, on greedy text."),
    Figure("agreement", "Top-1 agreement", "share of tokens", "higher",
           "How often both models have the same most likely token, on sampled text."),
    Figure("perplexity", "Perplexity", "effective choices", "lower",
           "Of the teacher's sampled text under the student; on the student's own text, under the teacher."),
)  # fmt: skip

GROUPS = (
    ("", "On prefixes the teacher visits", "what counts for drafting: the teacher's text is what gets served"),
    (ON_STUDENT, "On prefixes the student visits", "what counts when the student writes alone"),
)


def present_labels(heldout: Heldout) -> list[str]:
    """The labels there are, known ones first and in the order of the run."""
    known = [label for label in LABELS if heldout.get(label)]
    return known + [label for label in heldout if label not in LABELS and heldout[label]]


def value_of(heldout: Heldout, label: str, key: str) -> float:
    """A figure, NaN where it was not measured."""
    value = heldout.get(label, {}).get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def headline(heldout: Heldout) -> str:
    """What the run achieved, in one sentence made of its own figures."""
    labels = present_labels(heldout)
    chosen = [(f, f.title[0].lower() + f.title[1:]) for f in FIGURES if f.key in ("acceptance_t1", "reverse_kl")]
    parts = []
    for figure, name in sorted(chosen, key=lambda pair: pair[0].key):
        unit = "" if figure.unit.startswith("share") else f" {figure.unit}"
        values = [v for v in (value_of(heldout, label, figure.key) for label in labels) if math.isfinite(v)]
        if values:
            parts.append(
                f"{name} {_change(values[0], values[-1])}{unit}"
                if len(values) > 1
                else f"{name} is {number(values[0])}{unit}"
            )
    if not parts:
        return "No held-out figures were measured."
    return "On held-out prompts, " + " and ".join(parts) + "."


def _change(before: float, after: float) -> str:
    if number(before) == number(after):
        return f"stayed at {number(after)}"
    return f"{'rose' if after > before else 'fell'} from {number(before)} to {number(after)}"


def table(heldout: Heldout) -> str:
    """The held-out figures as plain text, a line a metric, a column a moment of the run."""
    labels = present_labels(heldout)
    lines = [" " * 36 + "".join(f"{LABELS.get(label, label):>18}" for label in labels)]
    for suffix, title, _ in GROUPS:
        lines.append(title)
        for figure in FIGURES:
            values = (number(value_of(heldout, label, figure.key + suffix)) for label in labels)
            lines.append(f"  {figure.title:34}" + "".join(f"{value:>18}" for value in values))
    return "\n".join(lines)
