"""Show how far long work is, on a terminal; stay quiet in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]  # what is written, bytes done, bytes in all


@contextmanager
def reporting(report: Report | None) -> Iterator[Report]:
    """Give the caller's report, or else a bar on the terminal, or else one that does nothing."""
    if report is not None:
        yield report
    elif not sys.stderr.isatty():
        yield lambda _what, _done, _total: None
    else:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
