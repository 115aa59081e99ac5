"""Replace loops over tokens that are written out by `Scan`.

A `Scan` gets one state, which starts with zeros as a cache does. If a loop has several states, or one that starts with
other numbers, that state is a tensor of all of them and of a row of ones, which is zeros before the first token only:
there the body takes the numbers that the loop starts with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.decompose.unrolled_loops import PATTERN, Element, Loop, find_loop
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import upstream
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.ops.content import is_zero


def roll_up_loops(editor: Editor) -> None:
    """Replace recurrences that are written out token by token by `Scan`."""
    shapes = read_inputs(editor.graph).shapes
    for node in list(editor.graph):
        with deep_recursion():
            loop = find_loop(shapes, node)
        if loop is not None:
            editor.before = node
            _add_scan(editor, shapes, loop)
            remove_dead(editor.graph)


def _add_scan(editor: Editor, shapes: Shapes, loop: Loop) -> None:
    """Add the `Scan` of a loop in place of the tensor of its rows."""
    result, body = loop.rows.result, _Body(editor, shapes, loop)
    state, row = body.build()
    sources = list(body.elements)
    graph = ir.Graph(
        [body.state, *body.elements.values()], [state, row], nodes=body.nodes,
        opset_imports=dict(editor.graph.opset_imports), name=editor.unique_name(f"{result.name}.body"),
    )  # fmt: skip
    attributes = {
        "body": graph, "num_scan_inputs": len(sources), "scan_input_axes": [axis for _, axis in sources],
        "scan_output_axes": [loop.rows.axis],
    }  # fmt: skip
    names = (editor.unique_name(f"{result.name}.{name}") for name in ("state", "rows"))
    outputs = [ir.Value(name=name, type=one.type) for name, one in zip(names, (state, row), strict=True)]
    editor.operator("", "Scan", [body.start(), *(source for source, _ in sources)], attributes, outputs)
    outputs[1].shape = ir.Shape(loop.rows.shape)
    editor.replace(result, outputs[1])


class _Body:
    """The nodes of the body of a loop, for one token.

    Attributes:
        nodes: The nodes.
        elements: The input of each tensor and axis of which it reads an element.
        state: The input that holds the state before the token.
        sizes: Sizes of the state.
        is_plain: Whether the state is the only one of the loop, and starts with zeros.
    """

    def __init__(self, editor: Editor, shapes: Shapes, loop: Loop) -> None:
        self.editor, self.shapes, self.loop = editor, shapes, loop
        self.nodes: list[ir.Node] = []
        first, types = shapes[loop.starts[0]], {shapes[start].dtype for start in loop.starts}
        wide = ir.DataType.DOUBLE if ir.DataType.DOUBLE in types else ir.DataType.FLOAT
        self.dtype = first.dtype if first.dtype is not None and len(types) == 1 else wide
        self.is_plain = len(loop.starts) == 1 and is_zero(loop.starts[0])
        self._each = _sizes(first.shape)
        self._axis = min(1, len(self._each))  # of the states in the tensor of all of them, after the batch
        self.sizes = self._each if self.is_plain else self._joined_sizes(len(loop.starts) + 1)
        self.state = self._value("before", self.dtype, self.sizes)
        self.elements = {(one.source, one.axis): self._element(one) for one in loop.elements.values()}
        self._made: dict[ir.Value, ir.Value] = {}

    def start(self) -> ir.Value:
        """Return the state before the first token: zeros."""
        if self.is_plain:
            return self.outside(self.loop.starts[0])
        return self.editor.constant(np.zeros(self.sizes), self.dtype.numpy(), "zeros")

    def build(self) -> tuple[ir.Value, ir.Value]:
        """Add the nodes, and return the state after the token and its row."""
        self._before = [self.state] if self.is_plain else self._separate()
        rows = self.loop.rows
        after = [self._copy(self.loop.results[number]) for number in range(len(self.loop.starts))]
        state = after[0] if self.is_plain else self._joined(after)
        row = self._reshaped(self._copy(rows.rows[PATTERN]), _without(rows.shape, rows.axis))
        state = self._reshaped(state, self.sizes)  # an output of a body is no input of it
        state.type, state.shape = ir.TensorType(self.dtype), ir.Shape(self.sizes)
        row.type = ir.TensorType(self.shapes[rows.result].dtype or ir.DataType.FLOAT)
        row.shape = ir.Shape(_without(rows.shape, rows.axis))
        return state, row

    def _copy(self, value: ir.Value) -> ir.Value:
        """Return the value of a body that stands for one of the pattern."""
        if value not in self._made:
            self._made[value] = self._copied(value)
        return self._made[value]

    def _copied(self, value: ir.Value) -> ir.Value:
        element = self.loop.elements.get(value)
        if element is not None:
            return self._reshaped(self.elements[element.source, element.axis], _sizes(self.shapes[value].shape))
        node = value.producer()
        assert node is not None
        inputs = [value and self._read(node, index, value) for index, value in enumerate(node.inputs)]
        outputs = self._node(node.op_type, inputs, node.attributes, len(node.outputs), node.domain)
        self._made.update(zip(node.outputs, outputs, strict=True))
        return self._made[value]

    def _read(self, node: ir.Node, index: int, source: ir.Value) -> ir.Value:
        """Return what a node reads in the body: a state, a constant, or another value of the token."""
        number = self.loop.places.get((node, index))
        if number is not None:
            return self._before[number]
        if source not in self.loop.constants:
            return self._copy(source)
        array = small_constant(source)
        return self.outside(source) if array is None else self._constant(array)

    def outside(self, value: ir.Value) -> ir.Value:
        """Return a value that is computed before the loop from constants alone: sizes that it reads become numbers."""
        if not any(one.is_graph_input() for one in upstream([value])):
            return value
        fact, node = self.shapes[value], value.producer()
        if fact.value is not None and fact.dtype is not None:
            return self.editor.constant(fact.value, fact.dtype.numpy())
        assert node is not None
        inputs = [None if source is None else self.outside(source) for source in node.inputs]
        return self.editor.copy(node, inputs, "constant").outputs[value.index() or 0]

    def _separate(self) -> list[ir.Value]:
        """Add the states before the token, each with its start where no token came before."""
        numbers = [self._constant(np.array(number, np.int64)) for number in range(len(self.loop.starts) + 1)]
        rows = [self._add("Gather", [self.state, number], {"axis": self._axis}) for number in numbers]
        is_first = self._add("Equal", [rows[-1], self._constant(np.zeros((), self.dtype.numpy()))])
        return [
            self._add("Where", [is_first, self.outside(start), self._cast(row, self.dtype, self._type(start))])
            for start, row in zip(self.loop.starts, rows, strict=False)
        ]

    def _joined(self, states: Sequence[ir.Value]) -> ir.Value:
        """Add the tensor of all states after the token, and of a row of ones."""
        single = self._joined_sizes(1)
        types = [self._type(start) for start in self.loop.starts]
        rows = [
            self._reshaped(self._cast(value, dtype, self.dtype), single)
            for value, dtype in zip(states, types, strict=True)
        ]
        rows.append(self._constant(np.ones(single, self.dtype.numpy())))
        return self._add("Concat", rows, {"axis": self._axis})

    def _type(self, start: ir.Value) -> ir.DataType:
        return self.shapes[start].dtype or self.dtype

    def _cast(self, value: ir.Value, before: ir.DataType, after: ir.DataType) -> ir.Value:
        return value if before is after else self._add("Cast", [value], {"to": int(after)})

    def _joined_sizes(self, count: int) -> list[int]:
        return [*self._each[: self._axis], count, *self._each[self._axis :]]

    def _element(self, element: Element) -> ir.Value:
        """Return an input that holds an element, without the sequence axis."""
        fact = self.shapes[element.source]
        return self._value("element", fact.dtype, _without(_sizes(fact.shape), element.axis))

    def _reshaped(self, value: ir.Value, sizes: Sequence[int]) -> ir.Value:
        return self._add("Reshape", [value, self._constant(np.array(sizes, np.int64))])

    def _constant(self, array: np.ndarray) -> ir.Value:
        return self._add("Constant", [], {"value": ir.Tensor(array)})

    def _add(self, operator: str, inputs: Sequence[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Value:
        converted = {one.name: one for one in ir.convenience.convert_attributes(attributes or {})}
        return self._node(operator, inputs, converted, 1)[0]

    def _node(
        self, operator: str, inputs: Sequence[ir.Value | None], attributes: Any, count: int, domain: str = ""
    ) -> list[ir.Value]:
        outputs = [self._value(operator) for _ in range(count)]
        kept, name = list(attributes.values()), outputs[0].name
        self.nodes.append(ir.Node(domain, operator, inputs, kept, outputs=outputs, name=name))
        return outputs

    def _value(self, name: str, dtype: ir.DataType | None = None, sizes: Sequence[int] | None = None) -> ir.Value:
        return ir.Value(
            name=self.editor.unique_name(f"{self.loop.rows.result.name}.{name}"),
            type=None if dtype is None else ir.TensorType(dtype), shape=None if sizes is None else ir.Shape(sizes),
        )  # fmt: skip


def _without(sizes: Sequence[int], axis: int) -> list[int]:
    return [*sizes[:axis], *sizes[axis + 1 :]]


def _sizes(shape: Sequence[object] | None) -> list[int]:
    return [size for size in shape or () if isinstance(size, int)]


def remove_dead(graph: ir.Graph) -> None:
    """Remove the nodes of the bodies that nothing reads any more."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
