"""How far a batch of requests is, for those who watch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from spec.request import Result


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
