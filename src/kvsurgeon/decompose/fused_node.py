"""A fused node that is being decomposed: its inputs and attributes, and a builder of the nodes that replace it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.symbolic.fact import Fact

RIGHT_PADDING = "right padding is assumed: a fused operator gets sequence lengths, and would attend to left padding"


@dataclass(frozen=True, kw_only=True)
class KeyCount:
    """A number of keys that a fused node is given for each sequence, of which a decomposition reads nothing.

    Attributes:
        value: The number, less `missing`: one for each sequence, and maybe others behind them.
        missing: What is added to it.
        at: Name of the fused node.
        exact: Whether the node runs only if it has as many keys.
    """

    value: ir.Value
    missing: int
    at: str
    exact: bool


class FusedNode(NodeBuilder):
    """Read a fused node, and write standard operators before it: `op.MatMul(op.input(0), op.input(1))`.

    Attributes:
        node: The fused node.
        shapes: Shapes and types of all values.
        assumed: Assumptions of the decomposition, for the report.
        key_counts: Numbers of keys that the decomposition does not read.
    """

    def __init__(self, editor: Editor, node: ir.Node, shapes: Shapes) -> None:
        self.name = node.outputs[0].name or node.op_type
        super().__init__(editor, self.name, like=node)
        editor.before = node
        self.node = node
        self.shapes = shapes
        self.assumed: set[str] = set()
        self.key_counts: list[KeyCount] = []

    # What the node says

    def optional(self, index: int) -> ir.Value | None:
        """Return an input, or None if it is left out."""
        return self.node.inputs[index] if 0 <= index < len(self.node.inputs) else None

    def input(self, index: int) -> ir.Value:
        """Return a required input.

        Raises:
            UnsupportedError: It is left out.
        """
        value = self.optional(index)
        if value is None:
            raise self.unsupported(f"required input {index} is missing", hint="check that onnxruntime loads the model")
        return value

    def fact(self, index: int) -> Fact:
        """Return type, shape and known content of a required input."""
        return self.shapes[self.input(index)]

    def rank(self, index: int) -> int:
        """Return the rank of an input; 0 if it is left out or its shape is unknown."""
        return 0 if self.optional(index) is None else len(self.fact(index).shape or ())

    def size(self, index: int, axis: int = -1) -> int:
        """Return the size of an input along an axis.

        Raises:
            UnsupportedError: It is not static.
        """
        shape = self.fact(index).shape
        size = shape[axis] if shape else None
        if not isinstance(size, int):
            reason = f"axis {axis} of input {index} has no static size"
            raise self.unsupported(
                reason, expected="a number", found=str(size), hint="declare the shapes of its inputs"
            )
        return size

    def flag(self, name: str) -> bool:
        """Return an attribute that is 0 or 1; 0 by default."""
        return bool(self.node.attributes.get_int(name, 0))

    @property
    def dtype(self) -> ir.DataType:
        """The element type of the first output."""
        return self.shapes[self.node.outputs[0]].dtype or ir.DataType.FLOAT

    # What replaces it

    def number(self, number: float, dtype: ir.DataType | None = None) -> ir.Value:
        """Add a scalar constant; of the element type of the first output by default."""
        return super().number(number, dtype or self.dtype)

    def lowest(self) -> ir.Value:
        """Add the lowest finite number of the element type."""
        return self.number(float(self.dtype.min))

    def slice(self, value: ir.Value, start: int, end: int, axis: int, step: int = 1) -> ir.Value:
        """Slice a value along one axis."""
        return self.Slice(value, *(self.int64([number]) for number in (start, end, axis, step)))

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """Split a value into parts of these sizes, by slices."""
        return [self.slice(value, start, end, axis) for start, end in pairwise(accumulate(sizes, initial=0))]

    def reshape(self, value: ir.Value, *sizes: int) -> ir.Value:
        """Reshape a value; a size of 0 keeps the size there, and -1 is inferred."""
        return self.Reshape(value, self.int64(sizes))

    def split_heads(self, value: ir.Value, heads: int) -> ir.Value:
        """Rearrange `[batch, sequence, hidden]` to `[batch, heads, sequence, head_dim]`."""
        return self.Transpose(self.reshape(value, 0, 0, heads, -1), perm=[0, 2, 1, 3])

    def merge_heads(self, value: ir.Value) -> ir.Value:
        """Rearrange `[batch, heads, sequence, head_dim]` to `[batch, sequence, hidden]`."""
        return self.reshape(self.Transpose(value, perm=[0, 2, 1, 3]), 0, 0, -1)

    def assume_right_padding(self, counts: ir.Value, *, missing: int = 0, exact: bool = False) -> None:
        """Note that counts of keys, less `missing`, need not be read: those that they hide are after the text."""
        self.assumed.add(RIGHT_PADDING)
        self.key_counts.append(KeyCount(value=counts, missing=missing, at=self.name, exact=exact))

    def sequence_length(self, axis: int = 1) -> ir.Value:
        """Add the sequence length, which the first input has along this axis."""
        return self.Gather(self.Shape(self.input(0)), self.int64(axis))

    def positions(self, axis: int = 1) -> ir.Value:
        """Add the positions 0, 1, ... of all tokens, `[sequence]`."""
        return self.Range(self.int64(0), self.sequence_length(axis), self.int64(1))

    def finish(self, *results: ir.Value | None) -> None:
        """Replace the outputs of the node by these values, and remove the node.

        Raises:
            UnsupportedError: An output is used for which there is no value.
        """
        for output, result in zip(self.node.outputs, (*results, *[None] * len(self.node.outputs)), strict=False):
            if result is not None:
                result.type, result.shape = output.type, output.shape
                self.shapes.facts[result] = self.shapes[output]
                self.editor.replace(output, result)
            elif output.uses() or output.is_graph_output():
                raise self.unsupported(f"output `{output.name}` cannot be computed", hint="export without it")
        self.editor.graph.remove(self.node, safe=True)

    def unsupported(
        self, reason: str, *, hint: str, expected: str | None = None, found: str | None = None,
        code: Code = Code.FUSED_OPERATOR,
    ) -> UnsupportedError:  # fmt: skip
        """Return an error about this node."""
        reason = f"{self.node.op_type}: {reason}"
        return UnsupportedError(reason, code=code, at=self.name, expected=expected, found=found, hint=hint)

    def unsupported_past(self) -> UnsupportedError:
        """Return the error for a node that reads past keys and values."""
        return self.unsupported("the model already has a cache", code=Code.HAS_CACHE, hint="remove-cache removes it")
