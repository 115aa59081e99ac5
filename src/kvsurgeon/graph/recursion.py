"""Raise the recursion limit: recursion over values is as deep as the network, beyond the default after some layers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

DEEP = 10_000  # frames; the stack of the interpreter has room for several times as many


@contextmanager
def deep_recursion() -> Iterator[None]:
    """Allow deep recursion in the block."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEEP))
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
