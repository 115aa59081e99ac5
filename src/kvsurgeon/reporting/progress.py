"""The progress of passes and of a verification, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def verification_progress() -> Iterator[Callable[[int, int, str], None] | None]:
    """Yield a callback that shows the current step; None if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    console = Console(stderr=True)
    spinner = "dots" if console.encoding.startswith("utf") else "line"  # of dots, or of ASCII characters
    with console.status("running passes", spinner=spinner) as status:
        yield lambda done, total, name: status.update(f"{done + 1}/{total}: {name}")
