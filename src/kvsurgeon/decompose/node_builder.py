"""Writes standard operators in the place of one node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic.fact import Fact

Values = Sequence[ir.Value | None]


class Pen:
    """What is known of one node, and words for what is written before it."""

    def __init__(self, graph: ir.Graph, node: ir.Node, shapes: Shapes, taken: set[str]) -> None:
        self.graph = graph
        self.node = node
        self.shapes = shapes
        self.taken = taken  # names of values that there are
        self.name = node.outputs[0].name or node.op_type
        self.assumed: set[str] = set()

    def given(self, index: int) -> ir.Value | None:
        """An input, None where it is left out."""
        return self.node.inputs[index] if 0 <= index < len(self.node.inputs) else None

    def need(self, index: int) -> ir.Value:
        """An input that must be there.

        Raises:
            UnsupportedError: It is not.
        """
        value = self.given(index)
        if value is None:
            raise self.refused(f"its input {index} is missing", "a model that onnxruntime runs")
        return value

    def fact(self, index: int) -> Fact:
        """What is known of an input that must be there."""
        return self.shapes[self.need(index)]

    def rank(self, index: int) -> int:
        """How many axes an input has; 0 where it is left out or nothing is known of it."""
        return 0 if self.given(index) is None else len(self.fact(index).shape or ())

    def width(self, index: int, axis: int = -1) -> int:
        """The size of an input along an axis, which must be a number.

        Raises:
            UnsupportedError: It is none.
        """
        shape = self.fact(index).shape
        size = shape[axis] if shape else None
        if not isinstance(size, int):
            raise self.refused(f"the width of its input {index} is unknown", "give its inputs shapes")
        return size

    @property
    def dtype(self) -> ir.DataType:
        """The type that the node computes in."""
        return self.shapes[self.node.outputs[0]].dtype or ir.DataType.FLOAT

    def node_of(self, operator: str, inputs: Values, **attributes: Any) -> ir.Value:
        """Write a node, and return what it makes."""
        return self.nodes_of(operator, inputs, 1, **attributes)[0]

    def nodes_of(self, operator: str, inputs: Values, outputs: int, **attributes: Any) -> Sequence[ir.Value]:
        """Write a node with several outputs."""
        plain = {key: int(value) if isinstance(value, ir.DataType) else value for key, value in attributes.items()}
        built = ir.convenience.convert_attributes(plain)
        props = dict(self.node.metadata_props)
        made = [ir.Value(name=self._called(operator)) for _ in range(outputs)]
        node = ir.Node("", operator, inputs, built, outputs=made, name=made[0].name, metadata_props=props)
        self.graph.insert_before(self.node, node)
        return node.outputs

    def constant(self, array: np.ndarray) -> ir.Value:
        """Write a constant."""
        name = self._called("constant")
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _called(self, what: str) -> str:
        """A name that no value has."""
        number = 0
        while (name := f"{self.name}.{what}" + (f"_{number}" if number else "")) in self.taken:
            number += 1
        self.taken.add(name)
        return name

    def integers(self, numbers: Sequence[int] | int) -> ir.Value:
        """Write whole numbers, or one."""
        return self.constant(np.array(numbers, np.int64))

    def number(self, number: float, dtype: ir.DataType | None = None) -> ir.Value:
        """Write one number, of the type that the node computes in."""
        return self.constant(np.array(number, (dtype or self.dtype).numpy()))

    def lowest(self) -> ir.Value:
        """Write the lowest number of the type that the node computes in."""
        return self.number(float(self.dtype.min))

    def split(self, value: ir.Value, widths: Sequence[int], axis: int) -> list[ir.Value]:
        """Cut a value into pieces of these widths."""
        ends = np.cumsum(widths)
        bounds = [(int(end) - width, int(end)) for end, width in zip(ends, widths, strict=True)]
        return [self.sliced(value, start, end, axis) for start, end in bounds]

    def sliced(self, value: ir.Value, start: int, end: int, axis: int, step: int = 1) -> ir.Value:
        """Write a part of a value."""
        bounds = [self.integers([number]) for number in (start, end, axis, step)]
        return self.node_of("Slice", [value, *bounds])

    def reshaped(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Write a value in another form; 0 keeps a size, -1 is what remains."""
        return self.node_of("Reshape", [value, self.integers(sizes)])

    def heads_apart(self, value: ir.Value, heads: int) -> ir.Value:
        """Turn [batch, sequence, hidden] into [batch, heads, sequence, head_dim]."""
        return self.node_of("Transpose", [self.reshaped(value, 0, 0, heads, -1)], perm=[0, 2, 1, 3])

    def heads_together(self, value: ir.Value) -> ir.Value:
        """Turn [batch, heads, sequence, head_dim] into [batch, sequence, hidden]."""
        return self.reshaped(self.node_of("Transpose", [value], perm=[0, 2, 1, 3]), 0, 0, -1)

    def length(self, axis: int = 1) -> ir.Value:
        """Write how many tokens there are; the first input has them on this axis."""
        return self.node_of("Gather", [self.node_of("Shape", [self.need(0)]), self.integers(axis)])

    def positions(self, axis: int = 1) -> ir.Value:
        """Write the places of all tokens, [sequence]."""
        return self.node_of("Range", [self.integers(0), self.length(axis), self.integers(1)])

    def finish(self, *results: ir.Value | None) -> None:
        """Let whoever read the node's outputs read these, and take the node away.

        Raises:
            UnsupportedError: An output is read of which nothing was written.
        """
        for value, result in zip(self.node.outputs, (*results, *[None] * len(self.node.outputs)), strict=False):
            if result is None and (value.uses() or value.is_graph_output()):
                raise self.refused(f"its output `{value.name}` is used", "export without it")
            if result is not None:
                self._put(value, result)
        self.graph.remove(self.node, safe=True)

    def _put(self, value: ir.Value, result: ir.Value) -> None:
        name = value.name
        result.type, result.shape = value.type, value.shape
        self.shapes.facts[result] = self.shapes[value]
        ir.convenience.replace_all_uses_with(value, result, replace_graph_outputs=True)
        value.name = None
        result.name = name

    def refused(self, reason: str, hint: str) -> UnsupportedError:
        """An error about this node."""
        return UnsupportedError(f"{self.node.op_type}: {reason}", at=self.name, hint=hint)
