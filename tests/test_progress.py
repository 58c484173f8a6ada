"""What those see who watch long work, or read its log."""

import itertools

import pytest

from spec import progress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.status("begun") as say:
        for text in ("one", "two", "three", "four"):
            say(text)
    assert capsys.readouterr().err.split() == ["three"]
