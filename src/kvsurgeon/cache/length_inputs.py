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

from kvsurgeon.cache.layout import declared_names
from kvsurgeon.cache.pairs import CachePair
from kvsurgeon.dataflow.input_roles import read_inputs, required_inputs
from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import chain, is_fed
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dimension import LENGTH

# Source of the past length: the shape of the cache inputs, a separate input, the first position, the mask length.
PastLength = Literal["shape", "input", "positions", "mask"]

_VIEWS = (Trait.IDENTITY, Trait.REPEAT, Trait.RESHAPE, Trait.TRANSPOSE)
_SELECTIONS = (*_VIEWS, Trait.SELECT)  # each element of the result is an element of the first input


@dataclass(frozen=True, kw_only=True)
class LengthInput:
    """A value that counts past tokens.

    Attributes:
        value: The count.
        source: The graph input that is the count or contains it as an element.
        shape: Shape of the count in place of `value`.
    """

    value: ir.Value
    source: ir.Value
    shape: tuple[int, ...]

    @property
    def is_whole_input(self) -> bool:
        """Whether the graph input contains nothing else."""
        return self.value is self.source


def past_length_source(lengths: Sequence[LengthInput], pairs: Sequence[CachePair]) -> PastLength | None:
    """Return from what a graph reads the number of past tokens; None if from several inputs."""
    if not lengths:
        return "mask" if any(pair.is_buffer for pair in pairs) else "shape"
    if len(lengths) > 1 or any(pair.cache_mode == "dynamic" for pair in pairs):
        return None
    return "input" if lengths[0].is_whole_input else "positions"


def find_length_inputs(graph: ir.Graph, pairs: Sequence[CachePair]) -> list[LengthInput]:
    """Return the values that count past tokens, and so are 0 in a first call.

    Raises:
        UnsupportedError: An input that is no such count determines which rows are written.
    """
    partial = [pair.past for pair in pairs if pair.cache_mode == "new-tokens"]
    if not partial and not any(pair.is_buffer for pair in pairs):
        return []
    dimensions, _ = read_inputs(graph)
    token_dims = {
        name
        for value, sizes in dimensions.items()
        for name, size in zip(declared_names(value), sizes, strict=True)
        if size is LENGTH and len(sizes) > 1
    }
    shapes = infer_shapes(graph, dimensions, graph.opset_imports.get("", 1))
    found: dict[ir.Value, LengthInput] = {}
    for value in _combined_with_row_count(graph, partial):
        found |= _lengths_upstream(shapes, token_dims, value)
    for pair in pairs:
        for value in pair.lengths if pair.is_buffer else ():
            lengths = _lengths_upstream(shapes, token_dims, value, only_lengths=not pair.operands.is_declared)
            if pair.operands.is_declared:  # the operator may read the length off a mask
                lengths = {count: length for count, length in lengths.items() if length.is_whole_input}
            elif lengths and not _counts_from(value, set(lengths)):
                raise UnsupportedError(
                    "new rows may not be written directly after those of the past", code=Code.UNKNOWN_CACHE,
                    at=value.name, expected="rows that count up from the number of past tokens",
                    found=f"a number computed from `{next(iter(lengths)).name}`",
                )  # fmt: skip
            found |= lengths
    return list(found.values())


def set_to_zero(graph: ir.Graph, editor: Editor, length: LengthInput) -> None:
    """Replace a count of past tokens by 0, once or for each sequence of the batch."""
    assert length.source.dtype is not None
    dtype = length.value.dtype or length.source.dtype
    zero = editor.constant(np.zeros(length.shape), dtype.numpy(), name="no_past")
    batch = next(iter(declared_names(length.source)), None) if length.is_whole_input else None
    sized = next(
        (value for value in required_inputs(graph) if batch is not None and batch in declared_names(value)), None
    )
    if sized is not None:
        sizes = editor.node("Shape", [sized], name="sizes", dtype=ir.DataType.INT64)
        index = editor.constant([declared_names(sized).index(batch)], name="axis")
        sequences = editor.node("Gather", [sizes, index], {"axis": 0}, name="texts", dtype=ir.DataType.INT64)
        zero = editor.node("Expand", [zero, sequences], name="no_past_of_texts", dtype=zero.dtype)
    length.value.replace_all_uses_with(zero)


def _lengths_upstream(
    shapes: Shapes, token_dims: Collection[str | None], value: ir.Value, *, only_lengths: bool = False
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
            if length is not None:
                found[length.value] = length
            elif only_lengths:
                raise UnsupportedError(
                    "an input that is no length determines which rows are written", code=Code.UNKNOWN_CACHE,
                    at=current.name, expected="the number of past tokens", found=str(current.shape),
                )  # fmt: skip
    return found


def _length_input(
    shapes: Shapes, token_dims: Collection[str | None], source: ir.Value, element: ir.Value | None
) -> LengthInput | None:
    """Return the count that an input is, or that the element selected from it is."""
    if source.dtype is None or not source.dtype.is_integer():
        return None
    names = declared_names(source)
    if len(names) < 2 and not (set(names) - {None}) & set(token_dims):  # a scalar, or a number for each sequence
        return LengthInput(value=source, source=source, shape=(1,) * len(names))
    if element is None:
        return None
    return LengthInput(value=element, source=source, shape=(1,) * len(shapes[element].shape or ()))


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


def _counts_from(value: ir.Value | None, lengths: set[ir.Value]) -> bool:
    """Return whether numbers count up from a length, or are one."""
    start = _start(value, lengths)
    node = None if start is None or start in lengths else start.producer()
    if node is not None and node.op_type == "Add":
        one, other = node.inputs
        return any(_counts_from(a, lengths) and _counts_from_zero(b) for a, b in ((one, other), (other, one)))
    return start in lengths


def _counts_from_zero(value: ir.Value | None) -> bool:
    """Return whether numbers count up from 0, or are 0."""
    start = _start(value, set())
    numbers = None if start is None or start.producer() is not None else small_constant(start)
    return numbers is not None and numbers.size > 0 and numbers.reshape(-1)[0] == 0


def _start(value: ir.Value | None, stop: set[ir.Value]) -> ir.Value | None:
    """Return the value from which a range counts up, before any views."""
    if value is None:
        return None
    *_, last = chain(
        value,
        lambda n: n.inputs[0] if has_trait(n, *_VIEWS) or n.op_type == "Range" else None,
        stop=lambda v: v in stop,
    )
    return last
