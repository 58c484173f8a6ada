"""What a run says while it works: phase timings, one JSON line a step, trackers, a progress bar."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from onpolicy.checkpoint import atomic_file

if TYPE_CHECKING:
    import torch

PHASES = ("rollout", "score", "update", "sync")


class PhaseTimer:
    """Seconds spent in each phase of a step: ``with timer("rollout"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            wait_for_gpu()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def wait_for_gpu() -> None:
    """Until all that a GPU was asked for is done: without it, a time is that of the asking."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Means:
    """Means over all tokens of a step, whatever its batches: scalars are weighted by their batch's tokens."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, torch.Tensor], tokens: int) -> None:
        for name, value in values.items():
            total = value.double().sum().item() if value.ndim else value.item() * tokens
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._counts[name] = self._counts.get(name, 0) + tokens

    @classmethod
    def join(cls, parts: Iterable[Means]) -> Means:
        """The same means over the tokens of all parts."""
        whole = cls()
        for part in parts:
            for name, total in part._sums.items():
                whole._sums[name] = whole._sums.get(name, 0.0) + total
                whole._counts[name] = whole._counts.get(name, 0) + part._counts[name]
        return whole

    def result(self) -> dict[str, float]:
        return {name: self._sums[name] / max(self._counts[name], 1) for name in self._sums}


def mean_of(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure, the mean over the records that have it."""
    names = dict.fromkeys(name for record in records for name in record)
    return {name: fmean(record[name] for record in records if name in record) for name in names}


def peak_rss_gib() -> float:
    """Peak resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class JsonLines:
    """``metrics.jsonl``: one object a step, on disk as soon as the step is over."""

    def __init__(self, path: Path, keep: int = 0):
        """Opens for appending after the first ``keep`` lines; what a killed run wrote beyond its checkpoint goes."""
        self.path = path
        kept = path.read_text().splitlines(keepends=True)[:keep] if path.exists() else []
        with atomic_file(path) as file:  # a kill here must not cost the history
            file.writelines(kept)
        self.lines = len(kept)

    def write(self, record: dict[str, Any]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines += 1


class Progress:
    """A progress bar with tokens a second by phase; silent where nobody watches."""

    def __init__(self, enabled: bool):
        self._bar: Any = None
        self._task: Any = None
        if enabled:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), refresh_per_second=2,
            )  # fmt: skip
            self._bar.start()

    def stage(self, name: str, total: int, completed: int = 0) -> None:
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, visible=False)
            self._task = self._bar.add_task(name, total=total, completed=completed, note="")

    def advance(self, note: str, by: int = 1) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=by, note=note)

    def say(self, message: str) -> None:
        """A line above the bar, or plainly on stdout."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        else:
            print(message, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class Silent(Progress):
    """Of a process that is not the first: what it would say has been said."""

    def __init__(self) -> None:
        super().__init__(enabled=False)

    def say(self, message: str) -> None:
        """Nothing."""


def rates(seconds: dict[str, float], tokens: int) -> dict[str, float]:
    """Completion tokens a second, over the step and in each of its phases."""
    total = sum(seconds.values())
    return {"step": tokens / total} | {phase: tokens / s for phase, s in seconds.items() if s > 0}
