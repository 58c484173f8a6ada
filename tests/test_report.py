"""The report of a run: one HTML file whose figures, points and bars are those of the run."""

from __future__ import annotations

import itertools
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from onpolicy.evaluate.figures import FIGURES, duration, headline, number
from onpolicy.evaluate.report import write_report
from spec.pages import charts
from spec.pages.charts import Bar, Scale, Series

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text += data


def svgs(page: str) -> list[ET.Element]:
    return [ET.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def chart_named(page: str, name: str) -> ET.Element:
    (found,) = [svg for svg in svgs(page) if svg.get("aria-label", "").startswith(name)]
    return found


def titles(svg: ET.Element) -> list[str]:
    return [node.text or "" for node in svg.iter("title")]


def record(step: int, stage: str = "on_policy", parity: float | None = None, **more: Any) -> dict[str, Any]:
    seconds = {"rollout": 2.0, "score": 1.0, "update": 5.0, "sync": 0.001}
    tokens = 800
    if parity is not None:
        more["sync/logprob_abs_diff"] = parity
    return {
        "step": step, "stage": stage, "loss": 1.0 / step, "divergence": 2.0 / step, "reward": -0.5,
        "health/length/mean": 20.0 + step, "health/truncated": 0.25, "completion_tokens": tokens, "seconds": seconds,
        "tok_s": {"step": tokens / 8.001} | {k: tokens / v for k, v in seconds.items()}, **more,
    }  # fmt: skip


SUMMARY: dict[str, Any] = {
    "seconds": 100.0,
    "peak_rss_gib": 3.217,
    "heldout": {
        "start": {"reverse_kl": 8.0, "acceptance_t1": 0.001, "reverse_kl_on_student": 9.0},
        "after_warm_start": {"reverse_kl": 1.5, "acceptance_t1": 0.4},
        "end": {"reverse_kl": 0.75, "acceptance_t1": 0.4712, "reverse_kl_on_student": 0.5},
    },
    "throughput": {
        "on_policy": {
            "completion_tokens": 3000, "seconds": 40.0, "tok_s": 75.0,
            "seconds_by_phase": {"update": 10.0, "rollout": 30.0},
        }
    },
}  # fmt: skip


def report(tmp_path: Path, records: list[Any], summary: dict[str, Any], config: dict[str, Any] | None = None) -> str:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    write_report(tmp_path / "report.html", metrics, summary, config)
    text = (tmp_path / "report.html").read_text()
    Page(text), svgs(text)  # well-formed, whatever the input
    return text


def test_headline_and_table_show_the_held_out_figures(tmp_path: Path) -> None:
    page = Page(report(tmp_path, [record(1)], SUMMARY, {"name": "trial"}))
    assert (
        "On held-out prompts, acceptance at T=1 rose from 0.001 to 0.471 and "
        "reverse KL fell from 8.000 to 0.750 nats per token." in page.text
    )
    rows = [row[1:] for row in page.rows if row and row[0].startswith("Reverse KL")]
    assert rows == [["8.000", "1.500", "0.750", "−7.250"], ["9.000", "–", "0.500", "−8.500"]]
    (forward, _) = [row[1:] for row in page.rows if row and row[0].startswith("Forward KL")]
    assert forward == ["–"] * 4  # not measured
    assert ("h1", {}) in page.tags and "trial" in page.text and "3.22 GiB" in page.text and "1 min 40 s" in page.text


def test_points_lie_where_the_metrics_say(tmp_path: Path) -> None:
    page = report(tmp_path, [record(step) for step in (1, 2, 3, 4)], SUMMARY)
    svg = chart_named(page, "Completion length")
    assert titles(svg) == [f"Completion length, step {s}: {20 + s:.1f} tokens" for s in (1, 2, 3, 4)]
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]  # type: ignore[union-attr]
    ticks = [t for t in svg.iter("text") if t.get("class") == "tick" and t.get("text-anchor") == "end"]
    marks = {t.text: float(t.get("y", 0)) - 3.5 for t in ticks}
    per_unit = (marks["20"] - marks["0"]) / 20  # drawing units a token, by the axis' own labels
    assert [round((y - marks["0"]) / per_unit, 1) for _, y in points] == [21, 22, 23, 24]
    widths = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    assert max(widths) - min(widths) <= 0.11 and min(widths) > 0  # equal steps, up to rounding


def test_stages_are_drawn_apart_and_the_bound_is_drawn(tmp_path: Path) -> None:
    records = [record(1, "warm_start"), record(2, "warm_start")]
    records += [record(3, parity=0.02), record(4, parity=0.04)]
    page = report(tmp_path, records, SUMMARY, {"rollouts": {"parity_bound": 0.125}})
    assert titles(chart_named(page, "Loss, Warm start")) == ["Loss, step 1: 1.000 loss", "Loss, step 2: 0.500 loss"]
    assert titles(chart_named(page, "Loss, On-policy")) == ["Loss, step 3: 0.333 loss", "Loss, step 4: 0.250 loss"]
    parity = chart_named(page, "Sampler against trainer")
    assert [t.text for t in parity.iter("text") if t.get("class") == "note"] == ["bound 0.125"]
    assert "lowest 0.020, highest 0.040 nats" in parity.get("aria-label", "")


def test_speed_leaves_out_phases_that_take_no_time(tmp_path: Path) -> None:
    speed = chart_named(report(tmp_path, [record(1), record(2)], SUMMARY), "Speed")
    named = {title.split(",")[0]: title.rsplit(": ", 1)[1] for title in titles(speed)}
    assert named == {
        "whole step": "100.0 tokens/s".replace("100.0", number(800 / 8.001)), "rollout": "400 tokens/s",
        "score": "800 tokens/s", "update": "160 tokens/s",
    }  # fmt: skip


def test_time_bars_are_proportional_and_ordered_by_phase(tmp_path: Path) -> None:
    page = report(tmp_path, [record(1)], SUMMARY)
    bars = chart_named(page, "Time by phase")
    widths = [float(rect.get("width", 0)) for rect in bars.iter("rect")]
    assert [round(w / widths[1], 1) for w in widths] == [3.0, 1.0, 6.0]  # rollout 30 s, update 10 s, outside 60 s
    assert titles(bars)[0] == "On-policy, rollout: 30.0 seconds (75%)"
    rows = [row for row in Page(page).rows if row and row[0] in ("rollout", "update")]
    assert rows == [["rollout", "On-policy", "30.0", "75.0%", "100"], ["update", "On-policy", "10.0", "25.0%", "300"]]


def test_times_come_from_the_steps_where_the_summary_has_none(tmp_path: Path) -> None:
    page = report(tmp_path, [record(1), record(2)], {})
    assert "On-policy, update: 10.0 seconds" in titles(chart_named(page, "Time by phase"))[2]


def test_a_loss_that_is_the_divergence_is_drawn_once(tmp_path: Path) -> None:
    page = report(tmp_path, [record(1, loss=2.0), record(2, loss=1.0)], {})
    assert "Loss" in page and not any(s.get("aria-label", "").startswith("Divergence") for s in svgs(page))


@pytest.mark.parametrize("count", [0, 1])
def test_short_runs(tmp_path: Path, count: int) -> None:
    page = report(tmp_path, [record(1)] * count, {})
    assert "No held-out figures were measured." in page
    assert len([s for s in svgs(page) if s.get("aria-label", "").startswith("Loss")]) == count
    assert "<polyline" not in page  # a line needs two points; a single one is a dot


def test_missing_metrics_file(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", tmp_path / "metrics.jsonl", SUMMARY)
    assert "from 8.000 to 0.750" in (tmp_path / "report.html").read_text()


def test_gaps_for_nan_and_missing_values_and_torn_lines(tmp_path: Path) -> None:
    rewards = [0.1, 0.2, math.nan, 0.4, 0.5, math.inf, 0.7]
    records = [record(s, reward=r) for s, r in enumerate(rewards, 1)]
    del records[4]["reward"]
    records[0] |= {"tok_s": None, "seconds": None, "health/length/mean": "many"}
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(json.dumps(r) for r in records) + '\n{"step": 8, "rew')
    write_report(tmp_path / "report.html", metrics, {"heldout": {"end": {"reverse_kl": math.nan}}, "seconds": None})
    svg = chart_named((tmp_path / "report.html").read_text(), "Reward")
    assert [t.split(",")[1].split(":")[0] for t in titles(svg)] == [" step 1", " step 2", " step 4", " step 7"]
    assert len(svg.findall("polyline")) == 1  # 1-2; 4 and 7 stand alone
    assert "nan" not in ET.tostring(svg, "unicode").lower()


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>&'
    records = [record(1, evil, seconds={evil: 2.0}, tok_s={evil: 5.0}) | {evil: 3.0}]
    summary = {"heldout": {evil: {"reverse_kl": 1.0}}, "throughput": {evil: {"seconds_by_phase": {evil: 1.0}}}}
    page = Page(report(tmp_path, records, summary, {"name": evil, "prompts": {"system": evil}}))
    assert page.text.count("alert(") >= 6
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe"}
    assert not [a for _, attrs in page.tags for a in attrs if a in ("src", "href") or a.startswith("on")]
    style = (tmp_path / "report.html").read_text().partition("</style>")[0]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_charts_are_named_for_those_who_do_not_see_them(tmp_path: Path) -> None:
    page = report(tmp_path, [record(1), record(2)], SUMMARY)
    for svg in svgs(page):
        assert svg.get("role") == "img" and re.search(r"\d", svg.get("aria-label", ""))
        words = [t.text for t in svg.iter("text") if t.get("class") == "axis"]
        assert words == (["seconds"] if "bars" in svg.get("class", "") else ["step", words[-1]]) and all(words)


def test_configuration_is_read_beside_the_metrics(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: from-file\nrollouts: {parity_bound: 0.25}\n")
    page = report(tmp_path, [record(1, parity=0.01)], SUMMARY)
    assert "<h1>from-file</h1>" in page and ">bound 0.25<" in page


def test_same_input_same_bytes_and_no_scratch_file_left(tmp_path: Path) -> None:
    first = report(tmp_path, [record(1), record(2)], SUMMARY, {"name": "x"})
    assert report(tmp_path, [record(1), record(2)], SUMMARY, {"name": "x"}) == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(tmp_path, [record(1)], SUMMARY)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onpolicy.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_report(tmp_path / "report.html", tmp_path / "metrics.jsonl", {})
    assert (tmp_path / "report.html").read_text() == before


# -- the parts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 5, 10]),
        (0.03, 0.97, [0, 0.5, 1]),
        (-2, 7, [-5, 0, 5, 10]),
        (3.0, 3.0, [2.6, 2.8, 3.0, 3.2, 3.4]),
        (0.0, 0.0, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_log_ticks_cover_the_range() -> None:
    assert charts.log_ticks(30, 700) == pytest.approx([20, 50, 100, 200, 500, 1000])
    assert charts.log_ticks(3, 40_000) == pytest.approx([1, 10, 100, 1000, 10_000, 100_000])
    assert charts.log_ticks(100, 100) == pytest.approx([100, 200])


def test_scale_maps_ends_and_middle() -> None:
    assert [Scale(0, 4, 100, 0)(v) for v in (0, 1, 4)] == [100, 75, 0]
    assert [round(Scale(1, 100, 0, 10, log=True)(v), 9) for v in (1, 10, 100)] == [0, 5, 10]


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(float(i), 0.0) for i in range(5000)]
    points[1234], points[4321] = (1234.0, 9.0), (4321.0, -9.0)
    kept = charts.thin(points, 100)
    assert len(kept) <= 103 and {points[0], points[1234], points[4321], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_a_log_axis_leaves_out_what_is_not_positive() -> None:
    svg = ET.fromstring(
        charts.line_chart([Series("a", [(1, 0.0), (2, 10.0), (3, 20.0)])], title="t", unit="u", log=True)
    )
    assert [t.text for t in svg.iter("title")] == ["a, step 2: 10.0 u", "a, step 3: 20.0 u"]


def test_nothing_to_draw_draws_nothing() -> None:
    assert charts.line_chart([Series("a", [(1, math.nan)])], title="t", unit="u") == ""
    assert charts.stacked_bars([Bar("a")], title="t", unit="u") == ""


def test_figures_explain_every_held_out_metric() -> None:
    from onpolicy.evaluate.heldout import METRICS

    assert tuple(figure.key for figure in FIGURES) == METRICS


def test_numbers_and_durations_for_people() -> None:
    assert [number(v) for v in (0.43124, 3.14159, 41.26, 12345.6, 0.0, -0.5, 2e-4, math.nan, None)] == [
        "0.431", "3.142", "41.3", "12,346", "0.000", "-0.500", "2.0e-04", "–", "–",
    ]  # fmt: skip
    named = ["4.3 s", "1 min 00 s", "7 min 05 s", "2 h 12 min", "–"]
    assert [duration(s) for s in (4.26, 59.96, 425.0, 7920.0, math.nan)] == named


def test_headline_of_one_evaluation_and_of_no_change() -> None:
    assert headline({"end": {"reverse_kl": 0.5}}) == "On held-out prompts, reverse KL is 0.500 nats per token."
    same = {"start": {"acceptance_t1": 0.4}, "end": {"acceptance_t1": 0.4001}}
    assert headline(same) == "On held-out prompts, acceptance at T=1 stayed at 0.400."
