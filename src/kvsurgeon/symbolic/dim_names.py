"""Names of dimensions that runtimes and compilers expect in a decoder with a cache."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, CAPACITY, MAX, NEW, PAST, TOTAL, Dimension, Extent
from kvsurgeon.symbolic.sequence_axes import Length

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


def is_standard_name(name: str) -> bool:
    """Return whether runtimes take a dimension of this name for one of a decoder with a cache."""
    return name.replace(" ", "") in {*_NAMES.values(), "past_sequence_length+sequence_length"}


def dim_names(sizes: Sequence[Dimension]) -> DimNames:
    """Return the dimensions of a value in a decoder with a cache; None for one without a name."""
    return [_dim_name(size) for size in sizes]


def _dim_name(size: Dimension) -> int | str | None:
    if isinstance(size, Extent):
        return str(size)
    return size if isinstance(size, int) else _NAMES.get(size)
