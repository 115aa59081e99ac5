"""A past whose rows need not all be filled: those that hold nothing come first, and tokens stand later than they are.

Row r holds token r - U, where U rows are unfilled. A row that holds nothing is read as a token of the future, counted
from the end: no query sees those, which is what was proved of the model. So nothing has to be masked for it.
"""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.lengths import INT64, LengthValues
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import CAPACITY, PAST, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length


class UnfilledRows:
    """Brings context from the order of the tokens into that of the cache's rows, and masks the other way."""

    def __init__(self, editor: Editor, lengths: LengthValues) -> None:
        self.editor = editor
        self.lengths = lengths
        self.shifted = lengths.total != TOTAL and CAPACITY in getattr(lengths.total, "free_symbols", ())
        self._orders: dict[Dimension, ir.Value] = {}

    def as_rows(self, value: ir.Value, axes: Axes) -> ir.Value:
        """Context for all tokens, along these axes as the rows of the cache hold them."""
        return self._gathered(value, axes, dim.subtract(PAST, CAPACITY), "as_rows")

    def as_tokens(self, value: ir.Value, axes: Axes) -> ir.Value:
        """What is given for the rows of the cache, along these axes as the tokens come."""
        return self._gathered(value, axes, dim.multiply(-1, TOTAL), "as_tokens")

    def _gathered(self, value: ir.Value, axes: Axes, start: Dimension, suffix: str) -> ir.Value:
        """Count from a start that is below zero: what is negative counts from the end."""
        if not self.shifted:
            return value
        for axis in axes:
            if axis.role.resolved() is Length.NEW:
                continue
            if not axis.is_plain:
                raise UnsupportedError(
                    "context holds the tokens together with something else on one axis", at=value.name,
                    hint="past-length=shape, with the unfilled rows masked as padding",
                )  # fmt: skip
            inputs = [value, self._order(start)]
            name = f"{value.name}.{suffix}"
            value = self.editor.node("Gather", inputs, {"axis": axis.axis}, name=name, dtype=value.dtype)
        return value

    def _order(self, start: Dimension) -> ir.Value:
        if start not in self._orders:
            ends = [self.lengths.scalar(end) for end in (0, self.lengths.total, 1)]
            rows = self.editor.node("Range", ends, name="rows", dtype=INT64)
            # Not a range from that start: onnxruntime 1.31 makes a `Slice` of it, to which a negative end means more.
            self._orders[start] = self.editor.node("Add", [rows, self.lengths.scalar(start)], name="order", dtype=INT64)
        return self._orders[start]
