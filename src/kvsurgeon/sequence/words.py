"""Dimensions as the reader of a model knows them: the names that clients and compilers look for."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.sequence.axes import Axes, Length
from kvsurgeon.sequence.lengths import HELD, NEW, PAST, ROOM, SO_FAR
from kvsurgeon.shapes import dimension as dim
from kvsurgeon.shapes.dimension import BATCH, LENGTH, Dimension

BATCH_NAME = "batch_size"

Words = list[int | str | None]

_NAMES = {
    BATCH: BATCH_NAME,
    NEW: Length.NEW.value,
    PAST: "past_sequence_length",
    SO_FAR: Length.TOTAL.value,
    ROOM: "max_length",
    HELD: "cache_length",
    dim.add(HELD, NEW): "max_length",
}


def spelled(sizes: Sequence[Dimension]) -> Words:
    """Dimensions of a decoder with a cache; None where one has no name of its own."""
    return [size if isinstance(size, int) else _NAMES.get(size) for size in sizes]


def spelled_from_export(shape: Sequence[Dimension], axes: Axes, length: Dimension, total: Dimension) -> Words:
    """Dimensions of the export: each sequence axis at the length of its role, every other length at the total one."""
    words: Words = [
        total_word if size is LENGTH else word
        for size, word, total_word in zip(shape, spelled(shape), spelled([total] * len(shape)), strict=True)
    ]
    for axis in axes:
        whole = axis.is_plain and shape[axis.axis] == length
        size = NEW if axis.role.resolved() is Length.NEW else total
        words[axis.axis] = spelled([size])[0] if whole else None
    return words
