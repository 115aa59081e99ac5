"""Compute attention with batch and heads on two axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_operator
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension

Shape = tuple[Dimension, ...]


@dataclass(frozen=True, kw_only=True)
class UnmergeHeads:
    """Compute attention with batch and heads on two axes, and remove `Reshape` operators that change nothing.

    Before: `Reshape` merges batch and heads, products and softmax have rank 3, and a later `Reshape` separates the two
    axes again. After: the same operators in rank 4, with the same result.

    Not handled: operators between the two that combine a value which has the merged axis itself.
    """

    name: ClassVar[str] = "unmerge-heads"

    def apply(self, subject: Subject) -> Outcome:
        """Rewrite `subject.model`."""
        with deep_recursion():
            unmerger = _Unmerger(subject.model)
            for node in list(subject.model.graph):
                unmerger.visit(node)
        if not unmerger.replaced:
            return Unchanged(reason="no Reshape merges two axes that a later one separates")
        for output, by in unmerger.replaced.items():
            output.replace_all_uses_with(by)
        unmerger.editor.finish()
        return Changed(edits=unmerger.editor.edits + len(unmerger.replaced))


class _Unmerger:
    """Visits nodes in execution order, and keeps for each value with a merged axis how to compute it without.

    Attributes:
        replaced: What replaces the output of each `Reshape` that is not needed.
    """

    def __init__(self, model: ir.Model) -> None:
        self.editor = Editor(model)
        self.shapes = shapes_of(model.graph)
        self.separate: dict[ir.Value, _Separate] = {}
        self.replaced: dict[ir.Value, ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        """Follow one node; replace the output of a `Reshape` that only separates the axes again."""
        if is_operator(node, "Reshape"):
            self._reshape(node)
        elif len(node.outputs) == 1 and any(value in self.separate for value in node.inputs):
            attributes = self._attributes(node)
            if attributes is not None:
                self.separate[node.outputs[0]] = _Separate(node=node, attributes=attributes, whole=None)

    def _reshape(self, node: ir.Node) -> None:
        source, output = node.inputs[0], node.outputs[0]
        if source is None or output.is_graph_output():
            return
        before, after = self._shape(source), self._shape(output)
        if before is None or after is None:
            return
        if before == after:
            self.replaced[output] = self.replaced.get(source, source)
        elif len(before) == 4 and after == (dim.product(before[:2]), *before[2:]):
            self.separate[output] = _Separate(node=node, attributes={}, whole=source)
        elif source in self.separate and after == self._separated_shape(source):
            self.replaced[output] = self._build(source)

    def _shape(self, value: ir.Value) -> Shape | None:
        shape = self.shapes[value].shape
        return None if shape is None else tuple(shape)

    def _attributes(self, node: ir.Node) -> dict[str, object] | None:
        """Return the attributes of an operator in rank 4; None if it does not leave the merged axis as it is."""
        shape = self._shape(node.outputs[0])
        if shape is None or len(shape) != 3:
            return None
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        separate = [value in self.separate for value in node.inputs]
        if is_operator(node, "MatMul"):
            return attributes if all(separate) else None
        if is_operator(node, "Transpose"):
            order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [2, 1, 0]
            return {"perm": [0, *(place + 1 for place in order)]} if order[0] == 0 else None
        if is_operator(node, "Softmax"):
            axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
            return {"axis": -1} if axis in (-1, 2) and self.editor.opset >= 13 else None
        if not has_trait(node, Trait.BROADCAST, Trait.IDENTITY):
            return None
        others = [value for value, known in zip(node.inputs, separate, strict=True) if not known and value is not None]
        return attributes if all(self._repeats(value) for value in others) else None

    def _repeats(self, value: ir.Value) -> bool:
        """Return whether a value is the same for all indices of the merged axis."""
        shape = self._shape(value)
        return shape is not None and (len(shape) < 3 or shape[0] == 1)

    def _separated_shape(self, value: ir.Value) -> Shape | None:
        """Return the shape of a value with separate axes; None if operands separate the axis in two ways."""
        node = self.separate[value]
        shape = self._shape(value)
        if shape is None or node.whole is not None:
            whole = None if node.whole is None else self._shape(node.whole)
            return None if whole is None else whole
        found = {self._separated_shape(one) for one in node.node.inputs if one is not None and one in self.separate}
        leading = {None if one is None else one[:2] for one in found}
        (only,) = leading if len(leading) == 1 else (None,)
        return None if only is None else (*only, *shape[1:])

    def _build(self, value: ir.Value) -> ir.Value:
        """Return a value with separate axes."""
        entry = self.separate[value]
        if entry.whole is None:
            node = entry.node
            inputs = [self._build(one) if one in self.separate else one for one in node.inputs if one is not None]
            name = f"{value.name}.by_heads"
            entry.whole = self.editor.node(node.op_type, inputs, entry.attributes, name=name, dtype=value.dtype)
        return entry.whole


@dataclass(kw_only=True)
class _Separate:
    """The computation of a value without its merged axis.

    Attributes:
        node: The node that computes it with the merged axis.
        attributes: Attributes of the operator in rank 4.
        whole: The value with separate axes; None as long as it is not computed.
    """

    node: ir.Node
    attributes: dict[str, object]
    whole: ir.Value | None
