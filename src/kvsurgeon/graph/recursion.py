"""Deep graphs: a value is as deep as its network, and Python's usual limit is reached after some hundred nodes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

DEEP = 10_000  # frames; the interpreter's own stack holds several times as many


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Allow deep recursion inside, and restore the limit afterwards."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
