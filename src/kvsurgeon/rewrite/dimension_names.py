"""Standard names of dimensions in a decoder with a cache, as runtimes and compilers expect them."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, CAPACITY, LENGTH, MAX, NEW, PAST, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length

DimNames = list[int | str | None]

_NAMES = {
    BATCH: "batch_size",
    NEW: Length.NEW.value,
    PAST: "past_sequence_length",
    TOTAL: Length.TOTAL.value,
    MAX: "max_length",
    CAPACITY: "cache_length",
    dim.add(CAPACITY, NEW): "max_length",
}


def dim_names(sizes: Sequence[Dimension]) -> DimNames:
    """Return the dimensions of a value in a decoder with a cache; None for one without a standard name."""
    return [size if isinstance(size, int) else _NAMES.get(size) for size in sizes]


def dim_names_of_export(shape: Sequence[Dimension], axes: Axes, length: Dimension, total: Dimension) -> DimNames:
    """Return the dimensions of a value of the export at the two lengths.

    Args:
        shape: Shape in the export.
        axes: Sequence axes, each at the length of its variable.
        length: Length of the export.
        total: Length that replaces it everywhere else.
    """
    names = [dim_names([total if size is LENGTH else size])[0] for size in shape]
    for axis in axes:
        is_length = axis.is_plain and shape[axis.axis] == length
        size = NEW if axis.variable.resolved() is Length.NEW else total
        names[axis.axis] = dim_names([size])[0] if is_length else None
    return names
