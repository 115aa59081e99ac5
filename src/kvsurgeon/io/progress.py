"""Report the progress of writing files: a bar on a terminal, nothing in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnProgress = Callable[[str, int, int], None]  # file name, bytes done, bytes in total


@contextmanager
def progress_bar(on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """Return the given callback, or else one that updates a bar on the terminal, or else one that does nothing."""
    if on_progress is not None:
        yield on_progress
    elif not sys.stderr.isatty():
        yield lambda _name, _done, _total: None
    else:
        from rich.console import Console  # slow to import, and needed on a terminal only
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
