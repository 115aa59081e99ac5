"""Dims of past inputs that their names do not tell: head sizes, and the sequence axis of a buffer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kvsurgeon.errors import RunError
from kvsurgeon.runtime.axes import CacheIO, has_known_shape
from kvsurgeon.runtime.tensors import Array

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


def resolve_axes(
    cache: Sequence[CacheIO], run: Callable[[Sequence[CacheIO]], Mapping[str, Array]], unfilled: float
) -> tuple[CacheIO, ...]:
    """Return the cache with the sequence axis along which a call wrote rows, for pasts whose dims are numbers.

    Args:
        cache: The cache inputs and outputs.
        run: Runs the model on few tokens with empty buffers, and returns these by the names of the pasts.
        unfilled: Value of rows that no token filled.
    """
    if all(entry.is_axis_known for entry in cache):
        return tuple(cache)
    try:
        buffers = run(cache)
    except RunError:
        return tuple(cache)
    return tuple(
        entry if entry.is_axis_known else _with_axis(entry, buffers[entry.past.name] != unfilled) for entry in cache
    )


def _with_axis(entry: CacheIO, written: Array) -> CacheIO:
    """Return an entry with the axis whose last row was not written, if there is one."""
    axes = [axis for axis, size in enumerate(written.shape) if size > 1 and not written.take(-1, axis).any()]
    return replace(entry, axis=axes[0]) if len(axes) == 1 else entry


def _with_head_dim(entry: CacheIO, size: int) -> CacheIO:
    batch = next((dim for dim in entry.past.dims if not isinstance(dim, int)), None)
    dims = tuple(
        dim if isinstance(dim, int) or dim == batch or axis == entry.axis else size
        for axis, dim in enumerate(entry.past.dims)
    )
    return replace(entry, past=replace(entry.past, dims=dims))
