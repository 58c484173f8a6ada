"""How far long work is, for those who watch, or who read its log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from spec.request import Result

_QUIET_S = 30.0  # between two lines of a log


@contextlib.contextmanager
def bar(total: int, shown: bool) -> Iterator[Callable[[Result], None]]:
    """A bar of ``total`` requests and their tokens; gives what to call with each result. Nothing unless ``shown``."""
    if not shown:
        yield lambda result: None
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[tokens]} tokens"))
    with Progress(*columns, TimeElapsedColumn(), transient=True) as lines:
        line = lines.add_task("decoding", total=total, tokens=0)

        def advance(result: Result) -> None:
            tokens = sum(len(completion.token_ids) for completion in result.completions)
            lines.update(line, advance=1, tokens=lines.tasks[line].fields["tokens"] + tokens)

        yield advance


@contextlib.contextmanager
def status(first: str) -> Iterator[Callable[[str], None]]:
    """A line on standard error that is replaced by what the given function is called with.

    Where that is no terminal but a log, a line at most every half minute.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(first) as line:
            yield line.update
        return
    said = time.monotonic()

    def log(text: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _QUIET_S:
            said = time.monotonic()
            console.print(text, soft_wrap=True, highlight=False)

    yield log
