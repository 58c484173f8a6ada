"""``report.html``: what a run achieved, how it went and where its time went, in one file that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from onpolicy.checkpoint import atomic_file
from onpolicy.evaluate import figures
from onpolicy.metrics import PHASES
from spec.pages import charts, page
from spec.pages.numbers import duration, number

Record = Mapping[str, Any]  # one line of metrics.jsonl

# (key, title, unit, the axis starts at 0, explanation) of what is drawn of every stage
CHARTS = (
    ("loss", "Loss", "loss", False, "What the optimizer minimises."),
    ("divergence", "Divergence", "per token", False, "Mean distance of the student from its teacher."),
    ("reward", "Reward", "nats per token", False, "Mean of log π_T − log π_S on its tokens; 0 is a perfect match."),
    ("sync/logprob_abs_diff", "Sampler against trainer", "nats", True,
     "Mean difference of their log-probs of the sampler's tokens; beyond the bound the run stops."),
    ("health/length/mean", "Completion length", "tokens", True, "Mean of the step's completions."),
    ("health/truncated", "Truncated", "share", True, "Completions cut off at the token limit."),
)  # fmt: skip
COUNTERS = ("step", "policy_version", "completion_tokens", "rollouts")  # logged every step, not worth a chart
MIN_PHASE_SHARE = 0.02  # of a stage's time: the speed of a phase that takes less says nothing


def write_report(path: Path, metrics: Path, summary: dict[str, Any], config: dict[str, Any] | None = None) -> None:
    """Write the report of a run, whole or not at all.

    ``metrics`` is the run's metrics.jsonl (missing or empty: no charts), ``summary`` what its summary.json holds, any
    part of which may be missing. ``config`` is the resolved configuration; by default config.yaml beside ``metrics``,
    where there is one.
    """
    saved = metrics.parent / "config.yaml"
    if config is None and saved.exists():
        config = yaml.safe_load(saved.read_text())
    name = str((config or {}).get("name") or path.resolve().parent.name)
    with atomic_file(path) as file:
        file.write(render(name, read_metrics(metrics), summary, config or {}))


def read_metrics(path: Path) -> list[Record]:
    """The records of metrics.jsonl; a line that is not whole (the process was killed) is left out."""
    records: list[Record] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def render(name: str, records: Sequence[Record], summary: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The page, from data alone: the same input gives the same bytes."""
    heldout = summary.get("heldout") or {}
    stages: dict[str, list[Record]] = {}
    for record in records:
        stages.setdefault(str(record.get("stage", "steps")), []).append(record)
    bound = _finite((config.get("rollouts") or {}).get("parity_bound"))
    times = stage_times(stages, summary)
    body = [
        f'<header><p class="kicker">On-policy distillation</p><h1>{escape(name)}</h1>'
        f'<p class="headline">{escape(figures.headline(heldout))}</p>{_tiles(stages, summary)}</header>',
        _heldout_section(heldout),
        *(_stage_section(stage, lines, bound) for stage, lines in stages.items()),
        _time_section(times, _finite(summary.get("seconds"))),
        _config_section(config),
    ]
    return page.page(f"{name}: on-policy distillation", "\n".join(part for part in body if part))


def _finite(value: Any) -> float:
    """A number as float; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def stage_title(stage: str) -> str:
    """`warm_start` -> Warm start."""
    known = {"on_policy": "On-policy"}
    text = stage.replace("_", " ")
    return known.get(stage) or text[:1].upper() + text[1:]


def stage_times(stages: Mapping[str, Sequence[Record]], summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Stage -> {"tokens", "seconds": by phase}: the summary's, else added up from the steps."""
    times: dict[str, dict[str, Any]] = {}
    for stage, entry in (summary.get("throughput") or {}).items():
        seconds = {str(k): _finite(v) for k, v in (entry.get("seconds_by_phase") or {}).items()}
        times[str(stage)] = {"tokens": _finite(entry.get("completion_tokens")), "seconds": seconds}
    for stage, lines in stages.items():
        if stage not in times:
            times[stage] = {"tokens": _total(lines, "completion_tokens"), "seconds": _phase_seconds(lines)}
    for entry in times.values():
        positive = {k: v for k, v in entry["seconds"].items() if v > 0}
        entry["seconds"] = {k: positive[k] for k in sorted(positive, key=_phase_rank)}
    return times


def _total(lines: Sequence[Record], key: str) -> float:
    return sum(v for v in (_finite(line.get(key)) for line in lines) if math.isfinite(v))


def _phase_seconds(lines: Sequence[Record]) -> dict[str, float]:
    spent: list[Record] = [line["seconds"] for line in lines if isinstance(line.get("seconds"), dict)]
    return {phase: _total(spent, phase) for phase in dict.fromkeys(p for one in spent for p in one)}


def _phase_rank(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _colour(phase: str) -> int:
    return min(_phase_rank(phase), page.COLOURS - 1)


def _tiles(stages: Mapping[str, Sequence[Record]], summary: Mapping[str, Any]) -> str:
    steps = " + ".join(f"{len(lines):,}" for lines in stages.values()) or "0"
    named = f"Steps ({' + '.join(stage_title(s).lower() for s in stages)})" if stages else "Steps"
    throughput = summary.get("throughput") or {}
    tokens = _total(list(throughput.values()), "completion_tokens") or sum(
        _total(lines, "completion_tokens") for lines in stages.values()
    )
    entries = [
        ("Time", duration(_finite(summary.get("seconds")))),
        (named, steps),
        ("Completion tokens", f"{tokens:,.0f}"),
    ]
    entries += [(f"{stage_title(s)} tok/s", number(_finite(t.get("tok_s")))) for s, t in throughput.items()]
    return page.tiles([*entries, ("Peak memory", _gib(_finite(summary.get("peak_rss_gib"))))])


def _gib(value: float) -> str:
    return f"{value:.2f} GiB" if math.isfinite(value) else "–"


def _heldout_section(heldout: figures.Heldout) -> str:
    labels = figures.present_labels(heldout)
    if not labels:
        return "<section><h2>Held-out figures</h2><p>None: the evaluation was off, or never reached.</p></section>"
    head = ["Figure", *(figures.LABELS.get(label, label) for label in labels), "change"]
    bodies = []
    for suffix, title, meaning in figures.GROUPS:
        rows = [_figure_row(heldout, labels, figure, suffix) for figure in figures.FIGURES]
        heading = f'<th class="group" scope="rowgroup" colspan="{len(head)}">{title}<small>{meaning}</small></th>'
        bodies.append(f"<tbody><tr>{heading}</tr>{''.join(rows)}</tbody>")
    intro = "Student beside teacher on prompts it never trained on, both at temperature 1 unless named otherwise."
    return f"<section><h2>Held-out figures</h2><p class='hint'>{intro}</p>{page.table(head, bodies, 1)}</section>"


def _figure_row(heldout: figures.Heldout, labels: Sequence[str], figure: figures.Figure, suffix: str) -> str:
    values = [figures.value_of(heldout, label, figure.key + suffix) for label in labels]
    change = values[-1] - values[0] if len(values) > 1 else math.nan
    signed = f"{'+' if change > 0 else ''}{number(change)}".replace("-", "−", 1)
    unit = f"{figure.unit}, {figure.better} is better"
    about = f"{unit[0].upper()}{unit[1:]}." + ("" if suffix else f" {figure.meaning}")  # explained once
    return page.row(f"{escape(figure.title)}<small>{escape(about)}</small>", [], [*(number(v) for v in values), signed])


def _stage_section(stage: str, lines: Sequence[Record], bound: float) -> str:
    known = {key for key, *_ in CHARTS} | set(COUNTERS)
    drawn = [_chart(stage, lines, *chart, bound) for chart in _charts_of(lines)] + [_speed_chart(stage, lines)]
    extra = dict.fromkeys(k for line in lines for k, v in line.items() if k not in known and math.isfinite(_finite(v)))
    more = "".join(_chart(stage, lines, key, key, "value", False, "", math.nan) for key in extra)
    if more:
        more = f'<details><summary>More of this stage</summary><div class="grid-of">{more}</div></details>'
    title = f"{stage_title(stage)}: {len(lines):,} step{'s' * (len(lines) != 1)}"
    return f'<section><h2>{escape(title)}</h2><div class="grid-of">{"".join(drawn)}</div>{more}</section>'


def _charts_of(lines: Sequence[Record]) -> list[tuple[str, str, str, bool, str]]:
    """What to draw; a loss that is the plain mean of the divergence is drawn once, and says so."""
    pairs = [(_finite(line.get("loss")), _finite(line.get("divergence"))) for line in lines]
    if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in pairs):
        return list(CHARTS)
    both = ("loss", "Loss", "per token", False, "Mean distance of the student from its teacher.")
    return [both, *(chart for chart in CHARTS if chart[0] not in ("loss", "divergence"))]


def _points(lines: Sequence[Record], key: str) -> list[charts.Point]:
    return [(_step(line, index), _finite(line.get(key))) for index, line in enumerate(lines)]


def _step(line: Record, index: int) -> float:
    step = _finite(line.get("step"))
    return step if math.isfinite(step) else index + 1.0


def _chart(
    stage: str, lines: Sequence[Record], key: str, title: str, unit: str, zero: bool, hint: str, bound: float
) -> str:
    limit = ("bound", bound) if key == "sync/logprob_abs_diff" and math.isfinite(bound) else None
    series = [charts.Series(title, _points(lines, key))]
    chart = charts.line_chart(series, title=f"{title}, {stage_title(stage)}", unit=unit, bound=limit, zero=zero)
    return page.figure(title, chart, hint) if chart else ""


def _speed_chart(stage: str, lines: Sequence[Record]) -> str:
    seconds = _phase_seconds(lines)
    phases = [p for p in sorted(seconds, key=_phase_rank) if seconds[p] >= MIN_PHASE_SHARE * sum(seconds.values()) > 0]
    speeds: list[Record] = [line.get("tok_s") or {} for line in lines]
    steps = [_step(line, index) for index, line in enumerate(lines)]
    series = []
    for phase in ["step", *phases]:
        points = [(step, _finite(speed.get(phase))) for step, speed in zip(steps, speeds, strict=True)]
        if any(math.isfinite(y) for _, y in points):
            series.append(charts.Series("whole step" if phase == "step" else phase, points, _colour(phase)))
    chart = charts.line_chart(series, title=f"Speed, {stage_title(stage)}", unit="tokens/s", log=True)
    hint = f"Completion tokens a second, logarithmic; phases below {MIN_PHASE_SHARE:.0%} of the time are left out."
    return page.figure("Speed", chart, hint, page.legend([(s.name, s.colour) for s in series])) if chart else ""


def _time_section(times: Mapping[str, Mapping[str, Any]], total: float) -> str:
    colour = {phase: _colour(phase) for entry in times.values() for phase in entry["seconds"]}
    bars = [charts.Bar(stage_title(s), [(p, v, colour[p]) for p, v in e["seconds"].items()]) for s, e in times.items()]
    outside = total - sum(bar.total for bar in bars)
    if outside > 0:
        bars.append(charts.Bar("outside steps", [("evaluation, checkpoints, starting", outside, page.COLOURS - 1)]))
    chart = charts.stacked_bars(bars, title="Time by phase", unit="seconds")
    if not chart:
        return ""
    keys = sorted(colour.items(), key=lambda pair: _phase_rank(pair[0]))
    if outside > 0:
        keys.append(("evaluation, checkpoints, starting engines", page.COLOURS - 1))
    rows = "".join(_time_row(stage, phase, s, e) for stage, e in times.items() for phase, s in e["seconds"].items())
    head = ["Phase", "Stage", "seconds", "share of stage", "completion tok/s"]
    table = page.table(head, [f"<tbody>{rows}</tbody>"], 2)
    drawn = page.figure("Seconds", chart, legend=page.legend(keys), wide=True)
    return f"<section><h2>Where the time goes</h2>{drawn}{table}</section>"


def _time_row(stage: str, phase: str, seconds: float, entry: Mapping[str, Any]) -> str:
    share = seconds / sum(entry["seconds"].values())
    speed = number(entry["tokens"] / seconds) if share >= MIN_PHASE_SHARE else "–"
    return page.row(escape(phase), [stage_title(stage)], [f"{seconds:,.1f}", f"{share:.1%}", speed])


def _config_section(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"
