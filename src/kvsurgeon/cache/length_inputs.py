"""Values that count past tokens: inputs that give the length of the past if the shape of the cache does not.

In a first call they are 0. A buffer is written from its first row on, and a past of which not all rows need be filled
has no filled row. So the number at which rows are written, and the number that is combined with the row count of such a
past, is 0 then, whatever its name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.cache.layout import declared_names, declared_shape
from kvsurgeon.cache.pairs import CachePair
from kvsurgeon.dataflow.input_dimensions import read_inputs, required_inputs
from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_fed
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

# Source of the past length: the shape of the cache inputs, a separate input for all sequences of a batch or for each,
# the first position, the mask length.
PastLength = Literal["shape", "input", "per-sequence", "positions", "mask"]

_VIEWS = (Trait.IDENTITY, Trait.REPEAT, Trait.RESHAPE, Trait.TRANSPOSE)
_SELECTIONS = (*_VIEWS, Trait.SELECT)  # each element of the result is an element of the first input


@dataclass(frozen=True, kw_only=True)
class LengthInput:
    """A value that counts past tokens.

    Attributes:
        value: The count.
        source: The graph input that is the count or contains it as an element.
        shape: Shape of the count in place of `value`.
        counts_up: Whether the count is the first of the positions of the new tokens, which `value` holds.
    """

    value: ir.Value
    source: ir.Value
    shape: tuple[int, ...]
    counts_up: bool = False

    @property
    def is_whole_input(self) -> bool:
        """Whether the graph input contains nothing else."""
        return self.value is self.source

    @property
    def is_per_sequence(self) -> bool:
        """Whether the input may hold another count for each sequence of the batch."""
        sizes = declared_shape(self.source)
        return any(size != 1 for size in (sizes[:-1] if self.counts_up else sizes))


def past_length_source(lengths: Sequence[LengthInput], pairs: Sequence[CachePair]) -> PastLength | None:
    """Return from what a graph reads the number of past tokens; None if from several inputs."""
    if not lengths:
        return "mask" if any(pair.is_buffer for pair in pairs) else "shape"
    if len({length.source for length in lengths}) > 1 or any(pair.cache_mode == "dynamic" for pair in pairs):
        return None
    whole = next((length for length in lengths if length.is_whole_input), None)
    return "positions" if whole is None else "per-sequence" if whole.is_per_sequence else "input"


def find_length_inputs(graph: ir.Graph, pairs: Sequence[CachePair]) -> list[LengthInput]:
    """Return the values that count past tokens, and so are 0 in a first call.

    Raises:
        UnsupportedError: An input that is no such count determines which rows are written.
    """
    partial = [pair.past for pair in pairs if pair.cache_mode == "new-tokens"]
    if not partial and not any(pair.is_buffer for pair in pairs):
        return []
    given = read_inputs(graph)
    token_dims = {
        name
        for value, sizes in given.dimensions.items()
        for name, size in zip(declared_shape(value), sizes, strict=True)
        if size is given.length and len(sizes) > 1
    } - {None, 1}
    shapes = infer_shapes(graph, given.dimensions, graph.opset_imports.get("", 1))
    found: dict[ir.Value, LengthInput] = {}
    for value in _combined_with_row_count(graph, partial):
        found |= _lengths_upstream(shapes, token_dims, value)
    for pair in pairs:
        for value in pair.lengths if pair.is_buffer else ():
            lengths = _lengths_upstream(shapes, token_dims, value, only_lengths=not pair.operands.is_declared)
            if pair.operands.is_declared:  # the operator may read the length off a mask
                lengths = {count: length for count, length in lengths.items() if length.is_whole_input}
            found |= lengths
    sources = dict.fromkeys(length.source for length in found.values() if not length.is_whole_input)
    for source in sources:
        positions = _positions(token_dims, source)
        if positions is not None and not positions.is_per_sequence and _selects_elements(shapes, source):
            found[source] = positions
    return list(found.values())


def set_to_zero(graph: ir.Graph, editor: Editor, length: LengthInput) -> None:
    """Replace a count of past tokens by 0, once or for each sequence of the batch, or positions by 0, 1, 2, ..."""
    assert length.source.dtype is not None
    dtype = length.value.dtype or length.source.dtype
    zero = editor.constant(np.zeros(length.shape), dtype.numpy(), name="no_past")
    sizes = [_size_of(graph, editor, size) for size in declared_shape(length.source)] if length.is_whole_input else []
    counts = [size for size in sizes if size is not None]
    is_known = len(counts) == len(sizes)
    if length.counts_up and is_known:
        zero = _counted(editor, counts[-1], dtype, length.shape)
    if length.is_per_sequence and is_known and counts:
        target = editor.node("Concat", counts, {"axis": 0}, name="sizes", dtype=ir.DataType.INT64)
        zero = editor.node("Expand", [zero, target], name="no_past_of_texts", dtype=dtype)
    length.value.replace_all_uses_with(zero)


def _size_of(graph: ir.Graph, editor: Editor, size: int | str | None) -> ir.Value | None:
    """Return a declared size as a vector of one number; None if it is a name that no other input has."""
    if isinstance(size, int):
        return editor.constant([size], name="size")
    sized = next((value for value in required_inputs(graph) if size and size in declared_names(value)), None)
    if sized is None:
        return None
    sizes = editor.node("Shape", [sized], name="sizes", dtype=ir.DataType.INT64)
    index = editor.constant([declared_names(sized).index(size)], name="axis")
    return editor.node("Gather", [sizes, index], {"axis": 0}, name="count", dtype=ir.DataType.INT64)


def _counted(editor: Editor, count: ir.Value, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """Return 0, 1, 2, ... along the last axis of a shape."""
    start, step = (editor.constant(number, name="number") for number in (0, 1))
    end = editor.node("Squeeze", [count], name="end", dtype=ir.DataType.INT64)
    counted = editor.node("Range", [start, end, step], name="no_past_positions", dtype=ir.DataType.INT64)
    if dtype is not ir.DataType.INT64:
        counted = editor.node("Cast", [counted], {"to": int(dtype)}, name="no_past_positions", dtype=dtype)
    target = editor.constant([*shape[:-1], -1], name="shape")
    return editor.node("Reshape", [counted, target], name="no_past_positions", dtype=dtype)


def _lengths_upstream(
    shapes: Shapes, token_dims: Collection[int | str | None], value: ir.Value, *, only_lengths: bool = False
) -> dict[ir.Value, LengthInput]:
    """Return the counts of past tokens from which a value is computed.

    Args:
        shapes: Shapes of all values.
        token_dims: Names of the dimensions that are as long as the tokens of a call.
        value: The value.
        only_lengths: Whether the value must not be computed from another input.

    Raises:
        UnsupportedError: It is.
    """
    found: dict[ir.Value, LengthInput] = {}
    visited: set[ir.Value] = set()
    pending: list[tuple[ir.Value, ir.Value | None]] = [(value, None)]  # with the element selected downstream
    while pending:
        current, element = pending.pop()
        if current in visited:
            continue
        visited.add(current)
        shape = shapes[current].shape
        if shape is not None and all(size == 1 for size in shape):
            element = current
        node = current.producer()
        if node is not None and not is_shape_only(node):
            element = element if has_trait(node, *_SELECTIONS) else None
            pending += [(source, element) for source in node.inputs if source is not None]
        elif node is None and is_fed(current):
            length = _length_input(shapes, token_dims, current, element)
            if length is not None and length.counts_up and length.is_per_sequence and not only_lengths:
                continue  # positions of padded texts do not count rows unless rows are written there
            if length is not None:
                found[length.value] = length
            elif only_lengths:
                raise UnsupportedError(
                    "an input that is no length determines which rows are written", code=Code.UNKNOWN_CACHE,
                    at=current.name, expected="the number of past tokens", found=str(current.shape),
                )  # fmt: skip
    return found


def _length_input(
    shapes: Shapes, token_dims: Collection[int | str | None], source: ir.Value, element: ir.Value | None
) -> LengthInput | None:
    """Return the count that an input is, or that the element selected from it is."""
    if source.dtype is None or not source.dtype.is_integer():
        return None
    sizes = declared_shape(source)
    if len(sizes) < 2 and not {None, *token_dims} & set(sizes):  # a scalar, or a number for each sequence
        return LengthInput(value=source, source=source, shape=(1,) * len(sizes))
    if element is not None:
        return LengthInput(value=element, source=source, shape=(1,) * len(shapes[element].shape or ()))
    return _positions(token_dims, source)


def _positions(token_dims: Collection[int | str | None], source: ir.Value) -> LengthInput | None:
    """Return the positions that an input holds if it may: one for each token."""
    sizes = declared_shape(source)
    if sizes[-1] not in token_dims or any(size in token_dims for size in sizes[:-1]):
        return None
    return LengthInput(value=source, source=source, shape=(1,) * len(sizes), counts_up=True)


def _selects_elements(shapes: Shapes, value: ir.Value) -> bool:
    """Return whether nothing reads more of a value than its shape and single elements."""
    for node, _ in value.uses():
        shape = shapes[node.outputs[0]].shape
        is_element = shape is not None and all(size == 1 for size in shape)
        is_view = has_trait(node, *_VIEWS) and _selects_elements(shapes, node.outputs[0])
        if not (is_element or is_view or is_shape_only(node)):
            return False
    return not value.is_graph_output()


def _combined_with_row_count(graph: ir.Graph, pasts: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """Yield what is added to the row count of a past or subtracted from it."""
    counts: set[ir.Value] = set()
    for node in graph:
        others = [value for value in node.inputs if value is not None and value not in counts]
        if is_shape_only(node):
            if not set(node.inputs) & set(pasts):
                continue
        elif len(others) == len(node.inputs):
            continue
        if has_trait(node, Trait.ADD):
            yield from others
        counts.update(node.outputs)
