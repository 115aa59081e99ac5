"""Widths of a past that its model leaves open by name: found by asking the model, as nothing else tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kvsurgeon.errors import RunError
from kvsurgeon.runtime.axes import CacheEntry, is_known

USUAL = (64, 128, 80, 96, 32, 256, 16)  # tried first; then every multiple of 4


def settled(cache: Sequence[CacheEntry], run: Callable[[Sequence[CacheEntry]], object]) -> tuple[CacheEntry, ...]:
    """Return the entries with numbers in place of names that stand for no batch and no length.

    All such names are taken for one width, that of a head: the first with which the model runs.

    Args:
        cache: The entries.
        run: Runs the model on one token and pasts without rows.
    """
    cache = tuple(cache)
    if all(is_known(entry.past, entry.axis) for entry in cache):
        return cache
    for width in _widths():
        tried = tuple(_of_width(entry, width) for entry in cache)
        try:
            run(tried)
        except RunError:
            continue
        return tried
    return cache


def _widths() -> Iterator[int]:
    yield from USUAL
    yield from (width for width in range(4, 513, 4) if width not in USUAL)


def _of_width(entry: CacheEntry, width: int) -> CacheEntry:
    batch = next((dim for dim in entry.past.dims if not isinstance(dim, int)), None)
    dims = [
        dim if isinstance(dim, int) or dim == batch or place == entry.axis else width
        for place, dim in enumerate(entry.past.dims)
    ]
    return replace(entry, past=replace(entry.past, dims=tuple(dims)))
