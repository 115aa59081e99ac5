"""Dimensions as the reader of a model knows them: the names that clients and compilers look for."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.sequence.axes import Axes, Length
from kvsurgeon.sequence.lengths import NEW, PAST
from kvsurgeon.shapes import dimension as dim
from kvsurgeon.shapes.dimension import BATCH, LENGTH, Dimension

BATCH_NAME = "batch_size"
PAST_NAME = "past_sequence_length"

Words = list[int | str | None]

_NAMES = {BATCH: BATCH_NAME, NEW: Length.NEW.value, PAST: PAST_NAME, dim.add(PAST, NEW): Length.TOTAL.value}


def spelled(sizes: Sequence[Dimension]) -> Words:
    """Dimensions of a decoder with a cache; None where one has no name of its own."""
    return [size if isinstance(size, int) else _NAMES.get(size) for size in sizes]


def spelled_from_export(shape: Sequence[Dimension], axes: Axes, length: Dimension) -> Words:
    """Dimensions of the export: each sequence axis at the length of its role, every other length at the total one."""
    words: Words = [
        Length.TOTAL.value if size is LENGTH else word for size, word in zip(shape, spelled(shape), strict=True)
    ]
    for axis in axes:
        whole = axis.is_plain and shape[axis.axis] == length
        words[axis.axis] = (axis.role.resolved() or Length.TOTAL).value if whole else None
    return words
