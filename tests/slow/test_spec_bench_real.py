"""The benchmark on the default target with a distilled student as its draft: what it predicts, the engine does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spec.bench.cli import main

TARGET = Path.home() / ".cache" / "onpolicy" / "smollm2-135m-instruct-v1"
STUDENT = Path(__file__).parents[2] / "runs" / "quickstart" / "student"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not TARGET.is_dir() or not STUDENT.is_dir(), reason="needs the teacher and runs/quickstart"),
]


@pytest.mark.parametrize("served", ["greedy", "probabilistic", "block"])
def test_prediction_and_engine_agree(served: str, tmp_path: Path) -> None:
    from onpolicy.prompts import word_problems

    questions = [problem.question for _, problem in zip(range(24), word_problems(11), strict=False)]
    data, out = tmp_path / "data.jsonl", tmp_path / "bench.json"
    data.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    arguments = (
        "--target", TARGET, "--draft", STUDENT, "--data", data, "--temperatures", 0, 1, "--top-ps", 1, "--served",
        served, "--max-tokens", 64, "--speed-prompts", 2, "--json", out,
    )  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    found = json.loads(out.read_text())
    for row in found["counted"]:
        gap = row["counted_less_expected"]
        # 3 times the half-width: at temperature 0 the interval is of rounding alone (bfloat16 near-ties)
        slack = max(1.5 * (gap["hi"] - gap["lo"]), 0.03)
        assert abs(gap["mean"]) <= slack, (row["temperature"], gap)
        assert row["tokens_per_step"]["mean"] > 1.1, "the student's drafts are hardly ever accepted"
