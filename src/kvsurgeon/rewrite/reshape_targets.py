"""Targets of reshapes, derived anew in as few numbers as possible: constants, 0 where a dimension stays, and one -1."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic.dimension import BATCH, Dimension


def reshape_target(lengths: LengthValues, after: Sequence[Dimension], before: Sequence[Dimension] = ()) -> ir.Value:
    """Return the target of a `Reshape` to these dimensions; where `before` is given, 0 means "as before"."""
    numbers: list[Dimension] = []
    for place, size in enumerate(after):
        stays = not isinstance(size, int) and place < len(before) and before[place] == size
        numbers.append(0 if stays else size)
    open_places = [place for place, size in enumerate(numbers) if not isinstance(size, int)]
    if open_places:
        rest = max(open_places, key=lambda place: after[place] is not BATCH)
        numbers[rest] = -1
    return lengths.vector(numbers)


def expand_target(lengths: LengthValues, after: Sequence[Dimension], kept: Sequence[bool]) -> ir.Value:
    """Return the target of an `Expand` to these dimensions; 1 where the operand's own dimension is kept."""
    return lengths.vector([1 if same else size for same, size in zip(kept, after, strict=True)])
