"""What a check says, and how a report of them is shown. Imports nothing heavy."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import IO, Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")  # from harmless to fatal
_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
_PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level
    name: str  # of the check, e.g. "chat templates"
    found: str  # what was measured, with its numbers
    cost: str = ""  # what it would have cost, had the run been started; empty when nothing is wrong
    remedy: str = ""  # what to change

    def text(self) -> str:
        """Everything but level and name, a line each."""
        parts = [self.found, f"cost: {self.cost}" if self.cost else "", f"mend: {self.remedy}" if self.remedy else ""]
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Report:
    """All findings of an examination and where its time went."""

    findings: list[Finding]
    seconds: dict[str, float] = field(default_factory=dict)  # by what was waited for

    @property
    def level(self) -> Level:
        """The worst finding's."""
        return max((finding.level for finding in self.findings), key=LEVELS.index, default="ok")

    @property
    def exit_status(self) -> int:
        """1 when an error was found, else 0."""
        return int(self.level == "error")

    def summary(self) -> str:
        """e.g. "no errors, 1 warning, 2 notes, 12 ok; 31 s: engine 12, prompts 3"."""
        counts = [(level, sum(f.level == level for f in self.findings)) for level in reversed(LEVELS)]
        words = [f"{n} {level}{'s' if level != 'ok' and n != 1 else ''}" for level, n in counts if n]
        verdict = ", ".join(words if self.level == "error" else ["no errors", *words])
        slowest = sorted(self.seconds.items(), key=lambda item: -item[1])
        where = ", ".join(f"{name} {seconds:.1f}" for name, seconds in slowest if seconds >= 0.1)
        return f"{verdict}; {sum(self.seconds.values()):.0f} s" + (f": {where}" if where else "")

    def to_json(self) -> str:
        """One object: level, findings in the order they were made, seconds."""
        return json.dumps(
            {"level": self.level, "findings": [asdict(f) for f in self.findings], "seconds": self.seconds}, indent=2
        )


def show(report: Report, file: IO[str] | None = None) -> None:
    """Print a table, worst findings last, where the eye ends up; plain lines where nobody watches a terminal."""
    file = file or sys.stdout
    ordered = sorted(report.findings, key=lambda finding: LEVELS.index(finding.level))
    if file.isatty():
        _show_table(ordered, report.summary(), file)
    else:
        file.write(plain_text(ordered) + "\n" + report.summary() + "\n")


def plain_text(findings: Iterable[Finding]) -> str:
    """A paragraph a finding, "level    name: what was found", wrapped to 120 columns."""
    indent = " " * 9
    paragraphs = []
    for finding in findings:
        head, *rest = finding.text().split("\n")
        lines = textwrap.wrap(f"{finding.level:<9}{finding.name}: {head}", _PLAIN_WIDTH, subsequent_indent=indent)
        for line in rest:
            lines += textwrap.wrap(line, _PLAIN_WIDTH, initial_indent=indent, subsequent_indent=indent + " " * 6)
        paragraphs.append("\n".join(lines))
    return "\n".join(paragraphs)


def _show_table(findings: list[Finding], summary: str, file: IO[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), show_header=False, width=min(shutil.get_terminal_size().columns, 140))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for finding in findings:
        table.add_row(Text(finding.level, _STYLES[finding.level]), Text(finding.name, "bold"), Text(finding.text()))
    console = Console(file=file)
    console.print(table)
    console.print(Text(summary, "bold"))
