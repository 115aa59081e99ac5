"""Caches with unfilled rows, which come first: row r holds token r - U if U rows are unfilled.

An unfilled row is treated as a future token, counted from the end of the context. Causality hides future tokens from
every query, so unfilled rows need no mask.
"""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.resizing.lengths import INT64, LengthValues
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import CAPACITY, PAST, TOTAL, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length


def in_row_order(lengths: LengthValues, value: ir.Value, axes: Axes) -> ir.Value:
    """Return context that is in the order of the tokens in the order of the cache rows, along these axes."""
    return _gathered(lengths, value, axes, dim.subtract(PAST, CAPACITY), "as_rows")


def in_token_order(lengths: LengthValues, value: ir.Value, axes: Axes) -> ir.Value:
    """Return an input that is in the order of the cache rows in the order of the tokens, along these axes."""
    return _gathered(lengths, value, axes, dim.multiply(-1, TOTAL), "as_tokens")


def filled_rows(lengths: LengthValues, value: ir.Value, axes: Axes) -> ir.Value:
    """Return an input that has an entry for each row of the cache for the tokens so far alone, along these axes."""
    cut = [axis.axis for axis in axes if axis.variable.resolved() is Length.TOTAL]
    if lengths.rows == lengths.total or not cut:
        return value
    start = dim.subtract(lengths.rows, TOTAL) if _unfilled_first(lengths.rows) else 0
    bounds = [lengths.vector([end] * len(cut)) for end in (start, dim.add(start, TOTAL))]
    axes_input = lengths.editor.constant(cut, name="axes")
    return lengths.editor.node("Slice", [value, *bounds, axes_input], name=f"{value.name}.so_far", dtype=value.dtype)


def _unfilled_first(rows: Dimension) -> bool:
    return CAPACITY in getattr(rows, "free_symbols", ())


def _gathered(lengths: LengthValues, value: ir.Value, axes: Axes, start: Dimension, suffix: str) -> ir.Value:
    """Gather along axes with indices that count up from a negative start: they wrap around at 0."""
    if not _unfilled_first(lengths.total):
        return value
    for axis in axes:
        if axis.variable.resolved() is Length.NEW:
            continue
        if not axis.is_plain:
            raise UnsupportedError(
                "an axis of the context holds more than tokens, so unfilled rows cannot be moved",
                code=Code.UNTRACEABLE_SEQUENCE, at=value.name,
                hint="use past-length=shape and mask the unfilled rows as padding",
            )  # fmt: skip
        order = lengths.once(("row order", start), lambda: _indices(lengths, start))
        name = f"{value.name}.{suffix}"
        value = lengths.editor.node("Gather", [value, order], {"axis": axis.axis}, name=name, dtype=value.dtype)
    return value


def _indices(lengths: LengthValues, start: Dimension) -> ir.Value:
    ends = [lengths.scalar(end) for end in (0, lengths.total, 1)]
    rows = lengths.editor.node("Range", ends, name="rows", dtype=INT64)
    # No Range from that start: onnxruntime 1.31 replaces it by a Slice, for which a negative end counts from the end.
    return lengths.editor.node("Add", [rows, lengths.scalar(start)], name="order", dtype=INT64)
