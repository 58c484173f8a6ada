"""The command line, the verdict and its report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spec.audit.cli import main
from spec.audit.report import page, rows
from spec.audit.trial import try_one
from spec.audit.verdict import Fault, Verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--target"),
        (["--target", "/no/such/model"], "no such directory"),
        (["--mode", "exact", "--engine", "http://127.0.0.1:9"], "cannot for a URL"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_exact_mode_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "verdict.json"
    assert main(["--mode", "exact", "--engine", "torch", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["verdict"] == "equivalent" and len(found["tests"]["gaps"]) == 6
    assert max(found["tests"]["gaps"].values()) < 1e-12


def test_json_has_what_others_rely_on_and_every_number_is_finite() -> None:
    found = json.loads(try_one("GarbageTemperature", 0, tokens=600).to_json())
    assert {"verdict", "epsilon", "delta", "tokens", "floor", "fault", "tests"} <= found.keys()
    assert found["verdict"] == "different" and {"name", "parameters"} <= found["fault"].keys()


def test_the_report_stands_alone_and_shows_histograms_and_path() -> None:
    verdict = try_one("correct", 0, tokens=600)
    text = page([verdict])
    assert text.count("<svg") == 3 and text.count('class="bar"') == 64 and "polyline" in text
    assert not re.search(r"(src|href)=|https?://", text)


def test_names_of_engines_are_escaped() -> None:
    verdict = Verdict("different", "<script>", "samples", 0.01, 3, fault=Fault("a & b", {"share": 0.5}))
    assert "<script>" not in page([verdict]) and "a &amp; b" in page([verdict])
    assert ("  share", "0.5") in rows(verdict)


@pytest.mark.parametrize(("answer", "status"), [("equivalent", 0), ("different", 3), ("undecided", 4)])
def test_exit_status(answer: str, status: int) -> None:
    verdict = Verdict(answer, "e", "statistical", 1e-3, 1000, epsilon=0.01)  # type: ignore[arg-type]
    assert verdict.exit_status == status and answer in verdict.sentence()
