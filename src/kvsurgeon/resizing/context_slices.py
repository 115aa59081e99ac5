"""Context at the lengths that token data asks for: computed for the total length, and sliced to the new tokens.

A slice of a context value gives each of its sequence axes one of the two lengths. It is pushed up through the operators
that made the value, by the links between their axes, until it reaches a range, a table or an input: in a decode step
nothing costs more than its result. If an operator has no links the whole value is computed and sliced, which is always
right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import raise_at
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.operator import AxisLinks, Label, Trait
from kvsurgeon.ops.resizing import WHOLE_NUMBERS
from kvsurgeon.ops.table import find_links, has_trait, operator_of
from kvsurgeon.resizing.lengths import LengthValues
from kvsurgeon.resizing.unfilled_rows import filled_rows, in_token_order
from kvsurgeon.resizing.windows import Window, kept_columns
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import NEW, Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis, reshape_axes

Key = tuple[tuple[SequenceAxis, Length], ...]

_ANY = LengthVariable()


class ContextSlices:
    """Slices of context values, each made once.

    Attributes:
        fixed: Whether the export fixed a length that context is not computed for: it must be shortened.
        window: The window whose tokens alone are read of inputs for all tokens so far; None for all.
    """

    window: Window | None = None

    def __init__(
        self,
        flow: TokenFlow,
        editor: Editor,
        lengths: LengthValues,
        inputs: Sequence[InputRole],
        same: dict[ir.Value, ir.Value],
    ) -> None:
        """Take what was analyzed.

        Args:
            flow: The token flow.
            editor: The editor of the graph.
            lengths: The two lengths as values.
            inputs: The variables of the graph inputs.
            same: The first of several context values that are computed alike.
        """
        self.flow = flow
        self.editor = editor
        self.lengths = lengths
        self.same = same
        self.given = {given.value: given for given in inputs}
        self.fixed = isinstance(flow.length, int) and flow.length != lengths.total
        self._made: dict[tuple[ir.Value, Key], ir.Value] = {}
        self._rebuilt: dict[tuple[ir.Node, tuple[ir.Value | None, ...]], ir.Node] = {}

    def so_far(self) -> ContextSlices:
        """Return the slices of context of the tokens so far alone, without unfilled rows of the cache."""
        lengths = self.lengths.so_far()
        if lengths is self.lengths:
            return self
        return ContextSlices(self.flow, self.editor, lengths, tuple(self.given.values()), self.same)

    def slice_of(self, value: ir.Value, axes: Axes = ()) -> ir.Value:
        """Return the value with each of these axes at the length of its variable; other axes are whole."""
        value = self.same.get(value, value)
        if not axes and not self.fixed and value in self.flow.fixed and self.fact(value).value is None:
            return value  # the same in every call; known numbers are made of lengths instead
        if not axes and self.fixed:
            axes = self.given_axes(value)
        key = tuple((axis.with_variable(_ANY), axis.variable.resolved() or Length.TOTAL) for axis in axes)
        if (value, key) not in self._made:
            self._made[value, key] = self._make(value, axes)
        return self._made[value, key]

    def made(self) -> Iterator[tuple[ir.Value, Axes]]:
        """Yield each value that was computed, with the axes that were sliced."""
        for value, key in self._made:
            yield value, tuple(axis.with_variable(LengthVariable(length)) for axis, length in key)

    def fact(self, value: ir.Value) -> Fact:
        """Return what is known of a value."""
        return self.flow.shapes[value]

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
            raise UnsupportedError("context reads a value of an outer graph", code=Code.CONTROL_FLOW, at=value.name)
        if self.flow.kinds.get(value, ValueKind.CONSTANT) is ValueKind.CONSTANT:
            return self.sliced(value, axes)
        try:
            made = self._resized(node, value, axes)
        except Exception as error:
            raise_at(node, error)
        if made is not None:
            return made
        whole = self._made[value, ()] = self._made.get((value, ())) or self._whole(node, value)
        return self.sliced(whole, axes, value)

    def _resized(self, node: ir.Node, value: ir.Value, axes: Axes) -> ir.Value | None:
        """The node's output with its slices pushed up; None if they cannot be."""
        operator, call = operator_of(node), self.flow.shapes.call(node)
        if operator is None:
            return None
        if operator.resize is not None:
            made: ir.Value | None = operator.resize(self, node, call, axes)
            return made
        links = find_links(call)
        if links is None or links.dynamic_range or links.token_rows or links.attention is not None:
            return None
        if links.row_major:
            return self._reshaped(node, call, axes)
        inputs = self._linked_inputs(node, value, call, links, axes, operator.type_only)
        return None if inputs is None else self.rebuilt(node, inputs, value)

    def _linked_inputs(
        self,
        node: ir.Node,
        value: ir.Value,
        call: OperatorCall,
        links: AxisLinks,
        axes: Axes,
        type_only: frozenset[int],
    ) -> list[ir.Value | None] | None:
        labels, unaligned = links.outputs[value.index() or 0], {links.joined, *links.mixed, *links.blocked}
        wanted: dict[Label, SequenceAxis] = {}
        for axis in axes:
            label = labels[axis.axis]
            if label is None or label in unaligned or label in links.repeated or label in links.selected:
                return None
            wanted[label] = axis
        inputs: list[ir.Value | None] = []
        for index, source in enumerate(node.inputs):
            places, shape = links.inputs[index], call.fact(index).shape
            if source is None or index in type_only:
                inputs.append(source)
            elif index == links.target:
                after = self.fact(value).shape
                if after is None or not dim.all_known(after):
                    return None
                inputs.append(self.lengths.vector(self.sizes(after, axes)))
            elif places is None:
                inputs.append(self.slice_of(source))
            elif shape is None:
                return None
            else:
                if links.addressing is not None and index == 0:
                    self._check_address(source)
                asked = tuple(
                    wanted[label].at(place)
                    for place, label in enumerate(places)
                    if label is not None and label in wanted and shape[place] != 1
                )
                made = self.slice_of(source, asked)
                inputs.append(
                    self._padded(source, made) if index == 0 and self._reads_all(call, links, wanted) else made
                )
        return inputs

    def _reads_all(self, call: OperatorCall, links: AxisLinks, wanted: Mapping[Label, SequenceAxis]) -> bool:
        """Whether indices of a fixed number of tokens read the operand, as to count the tokens that are not masked."""
        labels, shape = (links.inputs[1], call.fact(1).shape) if links.addressing is not None else (None, None)
        if not self.fixed or labels is None or shape is None:
            return False
        return any(size == self.flow.length and label not in wanted for label, size in zip(labels, shape, strict=True))

    def _padded(self, value: ir.Value, made: ir.Value) -> ir.Value:
        """Return a mask of the tokens so far, as `made` of a value, with masked tokens up to the fixed length."""
        axes, fact = self.given_axes(value), self.fact(value)
        if len(axes) != 1 or axes[0].variable.resolved() is not Length.TOTAL:
            return made
        if fact.shape is None or fact.dtype is None or not (fact.dtype is ir.DataType.BOOL or fact.dtype.is_integer()):
            raise UnsupportedError(
                "a mask is read at indices that are right for the exported length only", at=value.name,
                expected="a mask of integers or booleans", hint="export with dynamic axes", code=Code.FIXED_LENGTH,
            )  # fmt: skip
        later = list(fact.shape)
        later[axes[0].axis] = dim.subtract(self.flow.length, self.lengths.total)
        zero = np.zeros((1,) * len(later), fact.dtype.numpy())
        masked = [self.editor.constant(zero, fact.dtype.numpy(), name="masked"), self.lengths.vector(later)]
        rows = self.editor.node("Expand", masked, name=f"{value.name}.later", dtype=fact.dtype)
        return self.editor.node(
            "Concat", [made, rows], {"axis": axes[0].axis}, name=f"{value.name}.all", dtype=fact.dtype
        )  # fmt: skip

    def _reshaped(self, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
        before, after, source = call.fact(0).shape, call.result.shape, node.inputs[0]
        if before is None or after is None or source is None:
            return None
        cut = [axis for axis in axes if self.fixed or axis.variable.resolved() is Length.NEW]
        wanted = reshape_axes(tuple(cut), after, before, self.flow.length)
        if wanted is None or not dim.all_known(after):
            return None
        if any(self.lengths.at(axis.outer, Length.TOTAL) != axis.outer for axis in wanted):
            return None  # columns of a table of all tokens
        made = self.slice_of(source, tuple(sorted(wanted, key=lambda axis: axis.axis)))
        if len(node.inputs) < 2:
            return self.rebuilt(node, [made])
        return self.rebuilt(node, [made, self.lengths.vector(self.sizes(after, axes))])

    def _check_address(self, value: ir.Value) -> None:
        """Indices into a mask that is flattened with its batch are right for the exported length only."""
        if self.fixed and any(axis.outer != 1 for axis in self.given_axes(value)):
            raise UnsupportedError(
                "a mask is read at indices that are right for the exported length only", at=value.name,
                expected="its sequence axis apart", hint="export with dynamic axes", code=Code.FIXED_LENGTH,
            )  # fmt: skip

    def given_axes(self, value: ir.Value) -> Axes:
        """Return the sequence axes of a value that is an input in another shape or type; asked at a fixed length."""
        if value in self.given:
            lengths = self.given[value].lengths
            return tuple(SequenceAxis(axis, LengthVariable(length)) for axis, length in lengths.items())
        node = value.producer()
        if (
            node is None
            or not has_trait(node, Trait.RESHAPE, Trait.ELEMENTWISE)
            or self.flow.kinds.get(value) is not ValueKind.CONTEXT
        ):
            return ()
        source = node.inputs[0]
        before = None if source is None else self.flow.shapes[source].shape
        after = self.flow.shapes[value].shape
        if source is None or before is None or after is None:
            return ()
        return reshape_axes(self.given_axes(source), before, after, self.flow.length) or ()

    def _of_constant(self, value: ir.Value, axes: Axes) -> ir.Value:
        return self.sliced(value, axes) if axes else value

    def _of_input(self, value: ir.Value, axes: Axes) -> ir.Value:
        lengths = self.given[value].lengths
        wrong = [
            axis for axis in axes if lengths.get(axis.axis) is Length.NEW and axis.variable.resolved() is Length.TOTAL
        ]
        if wrong:
            raise UnsupportedError(
                "an input is needed for past and new tokens", code=Code.INPUT_ROLE, at=value.name,
                found="an input for the new tokens",
            )  # fmt: skip
        in_rows = tuple(SequenceAxis(axis, LengthVariable(length)) for axis, length in lengths.items())
        wanted = tuple(axis for axis in axes if lengths.get(axis.axis) is not Length.NEW)
        if self.window is not None:
            return self.sliced(self._kept_of_input(value, lengths, self.window), wanted, value)
        return self.sliced(filled_rows(self.lengths, in_token_order(self.lengths, value, in_rows), in_rows), wanted)

    def _kept_of_input(self, value: ir.Value, given: Mapping[int, Length], window: Window) -> ir.Value:
        """Return an input for all tokens so far for the new ones and those before that a window keeps."""
        axes = [axis for axis, length in given.items() if length is Length.TOTAL]
        if not axes:
            return value
        if window.first:
            return kept_columns(self.lengths, window, value)
        count = len(axes)
        starts = self.lengths.vector([dim.subtract(0, self.lengths.total)] * count)
        bounds = [starts, self.lengths.vector([int(ir.DataType.INT64.max)] * count), self.lengths.vector(axes)]
        return self.lengths.once(
            ("last of input", value),
            lambda: self.editor.node("Slice", [value, *bounds], name=f"{value.name}.last", dtype=value.dtype),
        )

    def _of_numbers(self, value: ir.Value, numbers: np.ndarray, dtype: ir.DataType) -> ir.Value:
        at = np.frompyfunc(lambda number: self.lengths.at(number, Length.TOTAL), 1, 1)
        return self.lengths.typed(self.lengths.array(np.asarray(at(numbers), dtype=object)), dtype)

    def sliced(self, value: ir.Value, axes: Axes, of: ir.Value | None = None) -> ir.Value:
        """Slice the last S of T along every axis that is to have the new length.

        An axis that holds the tokens of several sequences is split for that, and merged again.

        Args:
            value: The value at the total length.
            axes: Its sequence axes.
            of: The value of the export, if the value is a copy of it.
        """
        whole = not self.fixed or value in self.given
        cut = [axis for axis in axes if axis.variable.resolved() is Length.NEW or not whole]
        if not cut:
            return value
        shape = self.fact(of or value).shape or ()
        sizes, places = _split_sequences(shape, cut)
        is_merged = len(sizes) > len(shape)
        if any(axis.learned_rows for axis in cut) or (is_merged and (self.fixed or not dim.all_known(shape))):
            raise UnsupportedError(
                "cannot slice an axis of the context that contains more than tokens", code=Code.UNTRACEABLE_SEQUENCE,
                at=value.name,
            )  # fmt: skip
        spans = [
            (self.lengths.at(axis.inner, Length.TOTAL), *self.lengths.span(axis.variable.resolved() or Length.TOTAL))
            for axis in cut
        ]
        starts = [dim.multiply(start, inner) for inner, start, _ in spans]
        ends = [dim.multiply(end, inner) for inner, _, end in spans]
        source = self._reshaped_to(value, self.sizes(sizes, ())) if is_merged else value
        inputs = [source, self.lengths.vector(starts), self.lengths.vector(ends)]
        inputs.append(self.editor.constant([places.get(axis.axis, axis.axis) for axis in cut], name="axes"))
        new = self.editor.node("Slice", inputs, name=f"{value.name}.new", dtype=value.dtype)
        return self._reshaped_to(new, self.sizes(shape, axes)) if is_merged else new

    def _reshaped_to(self, value: ir.Value, sizes: Sequence[Dimension]) -> ir.Value:
        inputs = [value, self.lengths.vector(sizes)]
        return self.editor.node("Reshape", inputs, name=f"{value.name}.view", dtype=value.dtype)

    def _whole(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """The value as the export computes it, at the total length."""
        if self.fixed:
            raise UnsupportedError(
                f"the context has the fixed length of the export, and {node.op_type} has no rule for another length",
                code=Code.FIXED_LENGTH, at=value.name, hint="export with dynamic axes",
            )  # fmt: skip
        if is_shape_only(node):
            raise UnsupportedError(
                f"{node.op_type} reads a tensor of unknown shape", code=Code.UNTRACEABLE_SEQUENCE, at=value.name
            )
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            raise UnsupportedError("the context contains control flow", code=Code.CONTROL_FLOW, at=value.name)
        inputs = [None if source is None else self.slice_of(source) for source in node.inputs]
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
            length = NEW if axis.variable.resolved() is Length.NEW else self.lengths.total
            result[axis.axis] = self.lengths.at(axis.size(length), Length.TOTAL)
        return result


def _split_sequences(
    shape: Sequence[Dimension], axes: Sequence[SequenceAxis]
) -> tuple[list[Dimension], dict[int, int]]:
    """Return a shape with the sequences of each of these axes apart, and the index of the tokens of each axis in it."""
    outer, sizes, places = {axis.axis: axis.outer for axis in axes}, list[Dimension](), dict[int, int]()
    for place, size in enumerate(shape):
        sequences = outer.get(place, 1)
        tokens = dim.exact_quotient(size, sequences)
        if sequences != 1 and tokens is not None:
            sizes.append(sequences)
            size = tokens
        places[place] = len(sizes)
        sizes.append(size)
    return sizes, places
