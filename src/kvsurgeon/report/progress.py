"""How far the judge is: on a terminal, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def judging() -> Iterator[Callable[[int, int, str], None] | None]:
    """Give what the judge is to tell, or None where there is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with Console(stderr=True).status("operating") as status:
        yield lambda done, total, name: status.update(f"verifying {done + 1}/{total}: {name}")
