"""Dimensions as the reader of a model knows them: the names that clients and compilers look for."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, CAPACITY, LENGTH, MAX, NEW, PAST, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length

BATCH_NAME = "batch_size"

DimNames = list[int | str | None]

_NAMES = {
    BATCH: BATCH_NAME,
    NEW: Length.NEW.value,
    PAST: "past_sequence_length",
    TOTAL: Length.TOTAL.value,
    MAX: "max_length",
    CAPACITY: "cache_length",
    dim.add(CAPACITY, NEW): "max_length",
}


def dim_names(sizes: Sequence[Dimension]) -> DimNames:
    """Dimensions of a decoder with a cache; None where one has no name of its own."""
    return [size if isinstance(size, int) else _NAMES.get(size) for size in sizes]


def dim_names_of_export(shape: Sequence[Dimension], axes: Axes, length: Dimension, total: Dimension) -> DimNames:
    """Dimensions of the export: each sequence axis at the length of its role, every other length at the total one."""
    words: DimNames = [
        total_word if size is LENGTH else word
        for size, word, total_word in zip(shape, dim_names(shape), dim_names([total] * len(shape)), strict=True)
    ]
    for axis in axes:
        whole = axis.is_plain and shape[axis.axis] == length
        size = NEW if axis.role.resolved() is Length.NEW else total
        words[axis.axis] = dim_names([size])[0] if whole else None
    return words
