"""Rows that a scatter writes into a buffer: its indices are computed for some calls, as the model computes them.

In a call after `past` tokens, an integer input that follows the tokens of the call holds their positions, past, past +
1, ..., and any other integer input without an axis of tokens holds the number of past tokens. A static cache then
writes one row for each new token, directly after those of the past.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.cache.layout import declared_names, declared_shape
from kvsurgeon.dataflow.input_dimensions import declared_dimensions
from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.graph.execution import InputType, build_model, initializer, open_session
from kvsurgeon.graph.query import is_fed, producers, upstream
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.symbolic.fact import axis_of

_SEQUENCES = 2  # of a batch of any size
_ROWS = 3000  # of a buffer of any size
_MOST_INDICES = 1 << 18  # elements that are computed for one call

Dimensions = dict[ir.Value, tuple[Dimension, ...]]


@dataclass(frozen=True, kw_only=True)
class _BufferCall:
    """A call on `new` tokens after `past` tokens, with a buffer of `capacity` rows on an axis of size `rows`."""

    past: int
    new: int
    capacity: int
    rows: Dimension

    def size(self, dimension: Dimension) -> int:
        """Return a dimension in this call; one without a known name is as long as past and new tokens."""
        if isinstance(dimension, int):
            return dimension
        sizes = {LENGTH: self.new, BATCH: _SEQUENCES, self.rows: self.capacity}
        pairs = ((one, sizes.get(one, self.past + self.new)) for one in dimension.free_symbols)
        return int(dim.substitute(dimension, tuple(pairs)))


class WrittenRows:
    """Finds the axis along which scatters of a graph write the rows of new tokens.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._opset = graph.opset_imports.get("", 1)
        self._dimensions, length = _dimensions(graph)
        self._fixed = length if isinstance(length, int) else None
        self._axes: dict[Hashable, int] = {}  # the scatters of all layers often write at the same indices

    def axis(self, node: ir.Node) -> int:
        """Return the axis of its first input along which a scatter writes the rows after those of the past.

        Args:
            node: `ScatterElements`, `ScatterND` or `TensorScatter`.

        Raises:
            UnsupportedError: It writes other rows.
        """
        data, indices = node.inputs[0], node.inputs[2 if node.op_type == "TensorScatter" else 1]
        if _text(node, "reduction", "none") != "none":
            raise _other_rows(node, "rows that are combined with those of the past")
        if _text(node, "mode", "linear") != "linear":
            raise _other_rows(node, "a circular buffer, in which new rows replace the oldest ones")
        shape_of_data = None if data is None else str(data.shape)
        key = node.op_type, indices, shape_of_data, node.attributes.get_int("axis", 0)
        if data is not None and data.is_graph_input() and key in self._axes:
            return self._axes[key]
        self._axes[key] = self._find_axis(node, data, indices)
        return self._axes[key]

    def _find_axis(self, node: ir.Node, data: ir.Value | None, indices: ir.Value | None) -> int:
        wanted = producers(upstream([indices, data]))
        nodes = [one for one in self._graph if one in wanted]
        shapes = infer_shapes(nodes, self._dimensions, self._opset)
        shape = None if data is None else shapes[data].shape
        if shape is None or indices is None:
            raise _other_rows(node, "a buffer of unknown rank")
        run, found = _Indices(shapes, indices, nodes), ""
        for axis in _candidates(node, shape):
            mismatch = next(self._mismatches(node, run, axis, shape), None)
            if mismatch is None:
                return axis
            found = found or mismatch
        raise _other_rows(node, found)

    def _mismatches(self, node: ir.Node, run: _Indices, axis: int, shape: Sequence[Dimension]) -> Iterator[str]:
        """Yield descriptions of calls in which other rows are written than those of the new tokens."""
        for call in self._calls(axis, shape):
            indices, sizes = run(call), [call.size(size) for size in shape]
            if not np.array_equal(*_compared(node, axis, indices, sizes, call)):
                some = ", ".join(map(str, indices.reshape(-1)[:4].tolist()))
                yield f"indices [{some}, ...] for {call.new} tokens after {call.past}"

    def _calls(self, axis: int, shape: Sequence[Dimension]) -> Iterator[_BufferCall]:
        """Yield calls at the start, in the middle and at the end of a buffer, and one that fills it."""
        rows, new = shape[axis], self._fixed or 1
        capacity = rows if isinstance(rows, int) else _ROWS
        for past in sorted({0, 1, capacity // 2, capacity - new}):
            if 0 <= past <= capacity - new:
                yield _BufferCall(past=past, new=new, capacity=capacity, rows=rows)
        if self._fixed is None:
            call = _BufferCall(past=0, new=capacity, capacity=capacity, rows=rows)
            others = math.prod(call.size(size) for place, size in enumerate(shape) if place != axis)
            yield replace(call, new=max(1, min(capacity, _MOST_INDICES // others)))


class _Indices:
    """Computes the indices of a scatter for a call.

    Args:
        shapes: Facts about all values that they depend on.
        indices: The indices.
        nodes: The nodes that compute them, in order.

    Raises:
        UnsupportedError: They depend on more than lengths and positions.
    """

    def __init__(self, shapes: Shapes, indices: ir.Value, nodes: Sequence[ir.Node]) -> None:
        self._shapes = shapes
        self._result = indices
        self._numbers: list[ir.Value] = []  # known numbers, or inputs
        constants: list[onnx.TensorProto] = []
        computed: set[ir.Node] = set()
        given: set[ir.Value] = set()
        for value in upstream([indices], stop=given.__contains__, inputs=lambda node: node.inputs):
            tensor, node = constant_tensor(value), value.producer()
            if shapes[value].value is not None or is_fed(value):
                given.add(value)
                self._numbers.append(value)
            elif tensor is not None and not (is_weight(tensor) and tensor.dtype.is_floating_point()):
                constants.append(initializer(value.name, tensor))
            elif node is not None:
                computed.add(node)
            else:
                raise _undetermined(value)
        inputs: dict[str, InputType] = {}
        for value in self._numbers:
            fact = shapes[value]
            if fact.dtype is None or fact.shape is None or (is_fed(value) and not fact.dtype.is_integer()):
                raise _undetermined(value)
            inputs[value.name or ""] = (fact.dtype, len(fact.shape))
        model = build_model(
            [node for node in nodes if node in computed], inputs=inputs, initializers=constants,
            outputs=[indices.name], opsets={"": shapes.opset},
        )  # fmt: skip
        try:
            self._session = open_session(model)
        except Exception as error:
            raise _undetermined(indices) from error

    def __call__(self, call: _BufferCall) -> np.ndarray:
        """Return the indices in a call.

        Raises:
            UnsupportedError: They cannot be computed.
        """
        try:
            feeds = {value.name: self._number(value, call) for value in self._numbers}
            return np.asarray(self._session.run(None, feeds)[0])
        except Exception as error:
            raise _undetermined(self._result) from error

    def _number(self, value: ir.Value, call: _BufferCall) -> np.ndarray:
        fact = self._shapes[value]
        assert fact.dtype is not None
        if fact.value is not None:
            flat = [number if isinstance(number, (int, float)) else call.size(number) for number in fact.value.flat]
            return np.array(flat).reshape(fact.value.shape).astype(fact.dtype.numpy())
        sizes = [call.size(size) for size in fact.shape or ()]
        if fact.shape and fact.shape[-1] in (LENGTH, call.new):
            return np.broadcast_to(call.past + np.arange(call.new), sizes).astype(fact.dtype.numpy())
        return np.full(sizes, call.past, fact.dtype.numpy())


def _dimensions(graph: ir.Graph) -> tuple[Dimensions, Dimension]:
    """Return the dimensions of the inputs, in which a name that the tokens do not have is another length."""
    dimensions, length = declared_dimensions(graph)
    tokens = next(value for value, sizes in dimensions.items() if length in sizes and len(sizes) <= 3)
    names = set(declared_names(tokens)) - {None}

    def size_of(value: ir.Value, axis: int, declared: int | str | None, size: Dimension) -> Dimension:
        is_other = not isinstance(declared, int) and declared not in names and size is LENGTH
        return dim.symbol(str(declared or f"{value.name}.{axis}")) if is_other else size

    return {
        value: tuple(
            size_of(value, axis, declared, size)
            for axis, (declared, size) in enumerate(zip(declared_shape(value), sizes, strict=True))
        )
        for value, sizes in dimensions.items()
    }, length


def _candidates(node: ir.Node, shape: Sequence[Dimension]) -> list[int]:
    """Return the axes along which a scatter may write rows, one of many rows first."""
    if node.op_type != "ScatterND":
        return [axis_of(node.attributes.get_int("axis", -2 if node.op_type == "TensorScatter" else 0), len(shape))]
    rows = [size if isinstance(size, int) else 0 if size is BATCH else _ROWS for size in shape]
    return sorted(range(len(shape)), key=lambda axis: -rows[axis])


def _compared(
    node: ir.Node, axis: int, indices: np.ndarray, sizes: Sequence[int], call: _BufferCall
) -> tuple[np.ndarray, np.ndarray]:
    """Return indices, and those that write one row for each new token after those of the past, in one shape."""
    written = [call.new if place == axis else size for place, size in enumerate(sizes)]
    if node.op_type == "TensorScatter":
        return indices, np.full_like(indices, call.past)  # one number for each sequence
    if node.op_type == "ScatterElements":
        rows = call.past + np.arange(call.new)
        return indices, np.broadcast_to(
            rows.reshape([-1 if place == axis else 1 for place in range(len(sizes))]), written
        )
    depth = indices.shape[-1]
    places = np.indices(written[:depth]).reshape(depth, -1).T  # in the order of the updates
    if axis < depth:
        places[:, axis] += call.past
    return indices.reshape(-1, depth), places if axis < depth else places[:0]


def _text(node: ir.Node, name: str, default: str) -> str:
    """Return a string attribute of a node."""
    return node.attributes.get_string(name, default) or default


def _other_rows(node: ir.Node, found: str) -> UnsupportedError:
    return UnsupportedError(
        "new rows may not be written directly after those of the past", code=Code.UNKNOWN_CACHE,
        at=node.outputs[0].name, expected="rows that count up from the number of past tokens", found=found,
    )  # fmt: skip


def _undetermined(value: ir.Value) -> UnsupportedError:
    return UnsupportedError(
        "an input that is no length determines which rows are written", code=Code.UNKNOWN_CACHE, at=value.name,
        expected="the number of past tokens, or the positions of the new ones", found=str(value.shape),
    )  # fmt: skip
