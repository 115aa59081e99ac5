"""Context at the lengths that tokens ask for: computed for all tokens so far, and sliced to the new ones.

A view of a context tensor gives each of its sequence axes one of the two lengths. The slice to the new tokens is
pushed up through the operators that made the tensor, until it reaches a range, a table or an input: at a decode step
nothing costs more than its result. Where an operator has no rule the whole tensor is computed and sliced, which is
always right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import in_one_line
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.rewrite.slice_rules import RULES, WHOLE_NUMBERS
from kvsurgeon.rewrite.unfilled_rows import UnfilledRows
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import NEW, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis, follow_reshape

Key = tuple[tuple[SequenceAxis, Length], ...]

_ANY = LengthVariable()
_FORMS = frozenset({"Cast", "Identity", "Not", "Reshape", "Flatten", "Unsqueeze", "Squeeze"})


class ContextSlices:
    """Makes views of context, each once."""

    def __init__(
        self,
        flow: TokenFlow,
        editor: Editor,
        lengths: LengthValues,
        inputs: Sequence[InputRole],
        same: dict[ir.Value, ir.Value],
    ) -> None:
        self.flow = flow
        self.editor = editor
        self.lengths = lengths
        self.same = same  # context computed twice in the same way -> its first computation
        self.given = {given.value: given for given in inputs}
        self.filling = UnfilledRows(editor, lengths)
        self.shortened = isinstance(flow.length, int) and flow.length != lengths.total  # not of a buffer with its rows
        self._made: dict[tuple[ir.Value, Key], ir.Value] = {}
        self._rebuilt: dict[tuple[ir.Node, tuple[ir.Value | None, ...]], ir.Node] = {}

    def view(self, value: ir.Value, axes: Axes = ()) -> ir.Value:
        """Return the value with each of these axes at the length of its role; what is not named is whole."""
        value = self.same.get(value, value)
        if not axes and self.shortened:
            axes = self.given_axes(value)
        key = tuple((axis.with_role(_ANY), axis.role.resolved() or Length.TOTAL) for axis in axes)
        if (value, key) not in self._made:
            self._made[value, key] = self._make(value, axes)
        return self._made[value, key]

    def _make(self, value: ir.Value, axes: Axes) -> ir.Value:
        if constant_tensor(value) is not None:
            return self._of_constant(value, axes)
        if value in self.given:
            return self._of_input(value, axes)
        fact = self.flow.shapes[value]
        if fact.value is not None and fact.dtype in WHOLE_NUMBERS and not axes:
            return self._of_numbers(value, fact.value, fact.dtype)
        node = value.producer()
        if node is None:
            raise UnsupportedError("a value is made outside the graph", at=value.name)
        if self.flow.kinds.get(value, ValueKind.CONSTANT) is ValueKind.CONSTANT:
            return self.sliced(value, axes)
        rule = RULES.get(node.op_type)
        made = None
        if rule is not None:
            with in_one_line(node):
                made = rule(self, node, self.flow.shapes.call(node), axes)
        return made if made is not None else self.sliced(self._whole(node, value), axes)

    def given_axes(self, value: ir.Value) -> Axes:
        """Where the tokens of an input lie in what is only it in another form; asked at a length that is fixed."""
        if value in self.given:
            lengths = self.given[value].lengths
            return tuple(SequenceAxis(axis, LengthVariable(length)) for axis, length in lengths.items())
        node = value.producer()
        if node is None or node.op_type not in _FORMS or self.flow.kinds.get(value) is not ValueKind.CONTEXT:
            return ()
        source = node.inputs[0]
        before = None if source is None else self.flow.shapes[source].shape
        after = self.flow.shapes[value].shape
        if source is None or before is None or after is None:
            return ()
        return follow_reshape(self.given_axes(source), before, after, self.flow.length) or ()

    def _of_constant(self, value: ir.Value, axes: Axes) -> ir.Value:
        return self.sliced(value, axes) if axes else value

    def _of_input(self, value: ir.Value, axes: Axes) -> ir.Value:
        lengths = self.given[value].lengths
        wrong = [axis for axis in axes if lengths.get(axis.axis) is Length.NEW and axis.role.resolved() is Length.TOTAL]
        if wrong:
            raise UnsupportedError(
                "an input is needed for all tokens so far", at=value.name, found="given for the new ones"
            )
        in_rows = tuple(SequenceAxis(axis, LengthVariable(length)) for axis, length in lengths.items())
        wanted = tuple(axis for axis in axes if lengths.get(axis.axis) is not Length.NEW)
        return self.sliced(self.filling.as_tokens(value, in_rows), wanted)

    def _of_numbers(self, value: ir.Value, numbers: np.ndarray, dtype: ir.DataType) -> ir.Value:
        at = np.frompyfunc(lambda number: self.lengths.at(number, Length.TOTAL), 1, 1)
        return self.lengths.typed(self.lengths.array(np.asarray(at(numbers), dtype=object)), dtype)

    def sliced(self, value: ir.Value, axes: Axes) -> ir.Value:
        """Slice the last S of T along every axis that is to have the new length."""
        whole = not self.shortened or value in self.given
        cut = [axis for axis in axes if axis.role.resolved() is Length.NEW or not whole]
        if not cut:
            return value
        if not all(axis.outer == 1 and not axis.border for axis in cut):
            raise UnsupportedError("context holds the tokens together with something else on one axis", at=value.name)
        spans = [(axis.inner, *self.lengths.span(axis.role.resolved() or Length.TOTAL)) for axis in cut]
        starts = [dim.multiply(start, inner) for inner, start, _ in spans]
        ends = [dim.multiply(end, inner) for inner, _, end in spans]
        inputs = [value, self.lengths.vector(starts), self.lengths.vector(ends)]
        inputs.append(self.editor.constant([axis.axis for axis in cut], name="axes"))
        return self.editor.node("Slice", inputs, name=f"{value.name}.new", dtype=value.dtype)

    def _whole(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The value as the export computes it, at the total length."""
        if self.shortened:
            raise UnsupportedError(
                f"{node.op_type} makes context whose length the export fixed, and there is no rule to shorten it",
                at=value.name, hint="export with dynamic axes",
            )  # fmt: skip
        if node.op_type in SHAPE_ONLY:
            raise UnsupportedError(f"{node.op_type} of a tensor whose shape is unknown", at=value.name)
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise UnsupportedError("context goes through control flow", at=value.name)
        inputs = [None if source is None else self.view(source) for source in node.inputs]
        return self.rebuilt(node, inputs, value)

    def rebuilt(self, node: ir.Node, inputs: Sequence[ir.Value | None], value: ir.Value | None = None) -> ir.Value:
        """The node with other inputs; the node itself where they are the same."""
        value = value or node.outputs[0]
        if tuple(inputs) == tuple(node.inputs):
            return value
        key = (node, tuple(inputs))
        if key not in self._rebuilt:
            self._rebuilt[key] = twin = self.editor.copy(node, inputs, "view")
            for mine, original in zip(twin.outputs, node.outputs, strict=True):
                dtype = self.flow.shapes[original].dtype
                mine.type = mine.type if dtype is None else ir.TensorType(dtype)
        return self._rebuilt[key].outputs[value.index() or 0]

    def sizes(self, shape: Sequence[Dimension], axes: Axes) -> list[Dimension]:
        """Dimensions at the lengths that the axes ask for, the total one where they do not say."""
        result = [self.lengths.at(size, Length.TOTAL) for size in shape]
        for axis in axes:
            length = NEW if axis.role.resolved() is Length.NEW else self.lengths.total
            result[axis.axis] = axis.size(length)
        return result
