"""What a finished run leaves behind: the student with its card and draft vocabulary, the report and the summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onpolicy.checkpoint import write_json
from onpolicy.metrics import peak_rss_gib
from onpolicy.models import head_weight
from onpolicy.prepare import Prepared
from onpolicy.student import Student
from onpolicy.teacher_samples import TeacherSamples
from spec.provenance import provenance


@dataclass(frozen=True)
class Outcome:
    """What the trainer counted over the whole run, interruptions included."""

    seconds: float
    heldout: Mapping[str, Mapping[str, float]]  # label -> figures
    tokens: Mapping[str, int]  # stage -> completion tokens trained on
    spent: Mapping[str, float]  # "stage/phase" -> seconds


def leave(prepared: Prepared, student: Student, samples: TeacherSamples, outcome: Outcome) -> None:
    """Write everything into the run's directory; the summary last, since its presence says that the run is complete."""
    from onpolicy.evaluate.card import write_model_card
    from onpolicy.evaluate.report import write_report

    figures = summary(outcome)
    directory = prepared.directory / "student"
    student.save(directory, prepared.tokenizer)
    _choose_draft_vocabulary(directory, student, samples, prepared.config.student.draft_vocabulary)
    write_model_card(directory, prepared.config, figures)
    write_report(prepared.directory / "report.html", prepared.directory / "metrics.jsonl", figures)
    write_json(prepared.summary, figures)


def _choose_draft_vocabulary(directory: Path, student: Student, samples: TeacherSamples, size: int) -> None:
    """What the head keeps when the student drafts; never chosen by held-out samples."""
    from spec.drafters.vocabulary import build

    file = samples.file("warm_start")
    if size and file.exists() and size < len(head_weight(student.model)):
        build(directory, [file], size=size)


def summary(outcome: Outcome) -> dict[str, Any]:
    """What got better, how fast, at which memory, and what produced it."""
    return {
        "seconds": round(outcome.seconds, 1),
        "peak_rss_gib": round(peak_rss_gib(), 2),
        "heldout": {label: {k: round(v, 5) for k, v in f.items()} for label, f in outcome.heldout.items()},
        "throughput": {name: throughput(name, tokens, outcome.spent) for name, tokens in outcome.tokens.items()},
        "provenance": provenance(),
    }


def throughput(stage: str, tokens: int, spent: Mapping[str, float]) -> dict[str, Any]:
    """Seconds and completion tokens a second of a stage and of each of its phases; ``spent`` by "stage/phase".

    A phase's rate counts all tokens the stage trained on: a warm start's are scored once for all epochs. Phases that a
    stage does not have (under a thousandth of its time) have no rate.
    """
    seconds = {key.partition("/")[2]: value for key, value in spent.items() if key.startswith(stage + "/")}
    return {
        "completion_tokens": tokens,
        "seconds": round(sum(seconds.values()), 3),
        "tok_s": round(tokens / sum(seconds.values()), 1),
        "seconds_by_phase": {phase: round(value, 3) for phase, value in seconds.items()},
        "tok_s_by_phase": {
            phase: round(tokens / value, 1) for phase, value in seconds.items() if value > 1e-3 * sum(seconds.values())
        },
    }
