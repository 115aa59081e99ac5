"""Targets of `Reshape` and `Expand` with as few computed numbers as possible: constants, 0 for "copy", and one -1."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic.dimension import BATCH, Dimension


def reshape_target(lengths: LengthValues, after: Sequence[Dimension], before: Sequence[Dimension] = ()) -> ir.Value:
    """Return the target of a `Reshape` from one shape to another; no dimension is copied if `before` is unknown."""
    numbers: list[Dimension] = []
    for place, size in enumerate(after):
        is_copied = not isinstance(size, int) and place < len(before) and before[place] == size
        numbers.append(0 if is_copied else size)
    dynamic = [place for place, size in enumerate(numbers) if not isinstance(size, int)]
    if dynamic:
        numbers[max(dynamic, key=lambda place: after[place] is not BATCH)] = -1
    return lengths.vector(numbers)


def expand_target(lengths: LengthValues, after: Sequence[Dimension], kept: Sequence[bool]) -> ir.Value:
    """Return the target of an `Expand` to a shape; `kept` are the axes that the operand has in this size."""
    return lengths.vector([1 if same else size for same, size in zip(kept, after, strict=True)])
