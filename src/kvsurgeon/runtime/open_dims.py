"""Head sizes of past inputs that the model declares by name only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from kvsurgeon.errors import RunError
from kvsurgeon.runtime.axes import CacheIO, has_known_shape

COMMON_SIZES = (64, 128, 80, 96, 32, 256, 16)


def resolve_head_dims(cache: Sequence[CacheIO], run: Callable[[Sequence[CacheIO]], object]) -> tuple[CacheIO, ...]:
    """Return the cache with a number for each dim name that is neither a batch nor a length.

    All such names mean the size of a head: the first of the common sizes and the multiples of 4 with which the model
    runs.

    Args:
        cache: The cache inputs and outputs.
        run: Runs the model on one token with empty pasts.
    """
    cache = tuple(cache)
    if all(has_known_shape(entry.past, entry.axis) for entry in cache):
        return cache
    for size in dict.fromkeys((*COMMON_SIZES, *range(4, 513, 4))):
        resolved = tuple(_with_head_dim(entry, size) for entry in cache)
        try:
            run(resolved)
        except RunError:
            continue
        return resolved
    return cache


def _with_head_dim(entry: CacheIO, size: int) -> CacheIO:
    batch = next((dim for dim in entry.past.dims if not isinstance(dim, int)), None)
    dims = tuple(
        dim if isinstance(dim, int) or dim == batch or axis == entry.axis else size
        for axis, dim in enumerate(entry.past.dims)
    )
    return replace(entry, past=replace(entry.past, dims=dims))
