"""Inputs of a graph while its cache is empty: which of them are empty too, and how long a call is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.layout import declared_names, declared_shape
from kvsurgeon.cache.pairs import CachePair, has_features
from kvsurgeon.dataflow.input_dimensions import Dimensions, read_inputs, required_inputs
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.editor import Editor
from kvsurgeon.resizing.lengths import LengthValues, sources_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension

DYNAMIC_HINT = "use the model with dynamic shapes"


def fill_buffers(graph: ir.Graph, editor: Editor, pairs: Sequence[CachePair], *, dynamic: bool) -> int | None:
    """Declare as many tokens per call as the buffers have rows, and return that number; None if it is not fixed.

    All that is computed for the rows of a buffer is then computed for the tokens of the call.

    Args:
        graph: The graph.
        editor: Its editor.
        pairs: The cache.
        dynamic: Whether calls keep their dynamic length, which replaces the number of rows wherever the graph has it.

    Raises:
        UnsupportedError: A call has another fixed length, or the buffers have different capacities.
    """
    capacities = {declared_shape(pair.past)[pair.axis]: pair.past for pair in pairs if pair.is_buffer}
    capacity = next((size for size in capacities if isinstance(size, int)), None)
    if capacity is None:
        return None
    given = read_inputs(graph)
    length = given.length
    if len(capacities) > 1 or (isinstance(length, int) and length != capacity):
        raise UnsupportedError(
            "a cache input has a fixed length, so it cannot be empty", code=Code.FIXED_LENGTH,
            at=capacities[capacity].name, expected=f"buffers of {capacity} rows, and calls of any length",
            found=f"calls of {length} tokens, and buffers of {' and '.join(map(str, capacities))} rows",
            hint=DYNAMIC_HINT,
        )  # fmt: skip
    if dynamic and length is LENGTH:
        lengths = LengthValues(editor, sources_of(given.dimensions), total=LENGTH)
        _read_length(graph, lengths, capacity)
        _declare_rows(graph, pairs, capacity)
        return capacity
    for value, sizes in given.dimensions.items():
        declared = zip(declared_shape(value), sizes, strict=True)
        value.shape = ir.Shape([capacity if size is LENGTH else name for name, size in declared])
    return capacity


def _read_length(graph: ir.Graph, lengths: LengthValues, number: int) -> None:
    """Replace a number in integer constants by the length of the call."""
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        array = None if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32) else small_constant(value)
        if array is not None and value.dtype is not None and value.uses() and (array == number).any():
            numbers = np.where(array == number, LENGTH, array.astype(object))
            value.replace_all_uses_with(lengths.typed(lengths.array(numbers), value.dtype))


def _declare_rows(graph: ir.Graph, pairs: Sequence[CachePair], number: int) -> None:
    """Declare buffers of a number of rows, and masks of them, to have any number of rows."""
    taken = {name for value in (*graph.inputs, *graph.outputs) for name in declared_names(value)}
    name = next(one for number in count() if (one := f"rows{number or ''}") not in taken)
    axes = {value: pair.axis for pair in pairs if pair.is_buffer for value in (pair.past, pair.present)}
    masks = [value for value in required_inputs(graph) if value not in axes and len(value.shape or ()) != 3]
    for value in (*axes, *masks):
        sizes = enumerate(declared_shape(value))
        value.shape = ir.Shape(
            [name if size == number and axes.get(value, axis) == axis else size for axis, size in sizes]
        )
    for value in (value for node in graph for value in node.outputs if not value.is_graph_output()):
        if value.shape is not None and number in declared_shape(value):
            value.shape = None


def inputs_of_past_length(graph: ir.Graph, pairs: Sequence[CachePair]) -> list[ir.Value]:
    """Return the inputs other than the cache that are as long as the past, such as a mask of it: they are empty too.

    Raises:
        UnsupportedError: One is a cache input that no output updates.
    """
    lengths = {declared_names(pair.past)[pair.axis] for pair in pairs if not pair.is_buffer} - {None}
    pasts = [pair.past for pair in pairs]
    found = [value for value in required_inputs(graph) if value not in pasts and lengths & set(declared_names(value))]
    for value in found:
        if has_features(value):
            raise UnsupportedError(
                "an input has a row for each past token, and no output returns it with new rows",
                code=Code.UNKNOWN_CACHE, at=value.name, hint="the cache cannot be removed",
            )  # fmt: skip
    return found


def empty_dimensions(empty: Sequence[ir.Value], pairs: Sequence[CachePair], dimensions: Dimensions) -> Dimensions:
    """Return the dimensions of the empty inputs, with 0 for the length of the past.

    Args:
        empty: The inputs.
        pairs: The cache.
        dimensions: Dimensions of the other inputs.
    """
    sizes_by_name: dict[str | None, Dimension] = {
        name: size
        for value, sizes in reversed(dimensions.items())
        for name, size in zip(declared_names(value), sizes, strict=True)
    }
    rows = {pair.past: LENGTH if pair.is_buffer else 0 for pair in pairs}  # a buffer has a row per token of the call
    sizes_by_name |= {declared_names(pair.past)[pair.axis]: rows[pair.past] for pair in pairs}
    axes = {pair.past: pair.axis for pair in pairs}

    def size_of(value: ir.Value, axis: int, declared: int | str | None) -> Dimension:
        if axes.get(value) == axis and rows[value] == 0:
            return 0
        if isinstance(declared, int):
            return declared
        if axes.get(value) == axis:
            return rows[value]
        return sizes_by_name.get(declared, BATCH if axis == 0 else dim.symbol(f"{value.name}.{axis}"))

    return {value: tuple(size_of(value, *axis) for axis in enumerate(declared_shape(value))) for value in empty}
