"""Token data at the two lengths: nodes read operands of the right length; what depends on the cache is recomputed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.resizing.context_slices import ContextSlices
from kvsurgeon.resizing.unfilled_rows import in_row_order
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

InputsBefore = Mapping[ir.Node, tuple[ir.Value | None, ...]]  # inputs of each node before the rewrite

_TOTAL = LengthVariable(Length.TOTAL)


class TokenRewriter:
    """Rewires the nodes on token data.

    Attributes:
        slices: Context at the two lengths.
        before: Inputs of each node before the rewrite.
    """

    def __init__(self, slices: ContextSlices, before: InputsBefore) -> None:
        self.flow = slices.flow
        self.editor = slices.editor
        self.lengths = slices.lengths
        self.slices = slices
        self.before = before
        self._totals: dict[ir.Value, ir.Value] = {}
        self._copies: dict[ir.Value, ir.Value] = {}

    def add_total(self, value: ir.Value, total: ir.Value) -> None:
        """Set the value of past and new tokens that belongs to a value of the new tokens."""
        self._totals[value] = total

    def total(self, value: ir.Value) -> ir.Value:
        """Return a value for past and new tokens: from the cache, or computed from it."""
        if value not in self._totals:
            node = value.producer()
            if node is None:
                raise UnsupportedError(
                    "an input is needed for past and new tokens", code=Code.INPUT_ROLE, at=value.name
                )  # fmt: skip
            without = frozenset({"allowzero"}) if self._copies_zero(node) else frozenset()
            copy = self.editor.copy(node, self._inputs(node, Length.TOTAL), "all", without)
            for original, total in zip(node.outputs, copy.outputs, strict=True):
                self._totals[original] = total
                fact = self.flow.shapes.facts.get(original)
                if fact is not None and fact.shape is not None and fact.dtype is not None:
                    sizes = self.slices.sizes(fact.shape, self.axes_at(original, Length.TOTAL))
                    total.type, total.shape = ir.TensorType(fact.dtype), ir.Shape(dim_names(sizes))
        return self._totals[value]

    def axes_at(self, value: ir.Value, length: Length) -> Axes:
        """Return the sequence axes of a value, with those of the new tokens at a length."""
        return tuple(_at(axis, length) for axis in self.flow.axes.get(value, ()))

    def rewire(self, node: ir.Node) -> None:
        """Rewire a node on new tokens; routed regions are independent of the length."""
        if node in self.flow.routed_regions:
            return
        for index, value in enumerate(self._inputs(node, Length.NEW)):
            self.editor.replace_input(node, index, value)
        if self._copies_zero(node):
            self.editor.remove_attribute(node, "allowzero")
        if node in self.flow.diagonals:
            self._shift_diagonal(node, node)

    def copy(self, node: ir.Node) -> ir.Node:
        """Return a copy of a node on new tokens, which reads the copies of the nodes before it."""
        without = frozenset({"allowzero"}) if self._copies_zero(node) else frozenset()
        copy = self.editor.copy(node, self._inputs(node, Length.NEW), "new", without)
        if node in self.flow.diagonals:
            self._shift_diagonal(node, copy)
        self._copies |= zip(node.outputs, copy.outputs, strict=True)
        return copy

    def copied(self, value: ir.Value) -> ir.Value:
        """Return the copy of a value; the value itself if its node is not copied."""
        return self._copies.get(value, value)

    def _shift_diagonal(self, node: ir.Node, rewired: ir.Node) -> None:
        """Shift the diagonal of a `Trilu`: the first new query is in row P."""
        given = self.flow.shapes.call(node).numbers(1)
        diagonal = self.lengths.at(given[0] if given else 0, Length.TOTAL)
        rows, columns = (variable.resolved() for variable in self.flow.diagonals[node])
        if rows is Length.NEW and columns is Length.TOTAL:
            diagonal = dim.add(diagonal, self.lengths.past)
        elif rows is Length.TOTAL and columns is Length.NEW:
            diagonal = dim.subtract(diagonal, self.lengths.past)
        if len(rewired.inputs) < 2:
            rewired.resize_inputs(2)
        self.editor.replace_input(rewired, 1, self.lengths.scalar(diagonal))

    def _inputs(self, node: ir.Node, length: Length) -> list[ir.Value | None]:
        """Return the inputs of a node on tokens of a length."""
        return [
            None if value is None else self._input(node, index, value, length)
            for index, value in enumerate(self.before[node])
        ]

    def _input(self, node: ir.Node, index: int, value: ir.Value, length: Length) -> ir.Value:
        if self.flow.kinds.get(value) is ValueKind.TOKEN:
            variable = self.flow.operands.get((node, index))
            wanted = length if variable is None else variable.resolved()
            return self.total(value) if wanted is Length.TOTAL else self.copied(value)
        if self.flow.targets.get(node) == index:
            return self._target(node, value, length)
        if (node, index) in self.flow.addresses:
            return self._address(node, value, length)
        if (node, index) in self.flow.parameters:
            return self._parameter(node, index, value, length)
        axes = tuple(_at(axis, length) for axis in self.flow.demands.get((node, index), ()))
        return in_row_order(self.lengths, self.slices.slice_of(value, axes), axes)

    def _address(self, node: ir.Node, indices: ir.Value, length: Length) -> ir.Value:
        """Return indices within one call, which are as many as its tokens.

        Raises:
            UnsupportedError: They address keys too, which are all tokens so far.
        """
        axes = self.axes_at(node.outputs[0], length)
        if any(axis.variable.resolved() is Length.TOTAL for axis in axes):
            raise UnsupportedError(
                f"{node.op_type} has an index for each token of a call, and writes to all tokens so far",
                code=Code.UNTRACEABLE_SEQUENCE, at=indices.name,
            )  # fmt: skip
        return indices

    def _target(self, node: ir.Node, target: ir.Value, length: Length) -> ir.Value:
        """Return the target of a `Reshape` or `Expand`, computed from the shape of its result."""
        source, constant = self.before[node][0], constant_tensor(target)
        assert source is not None
        before, after = self.flow.shapes[source].shape or (), self.flow.shapes[node.outputs[0]].shape or ()
        given = self.slices.sizes(before, self.axes_at(source, length))
        sizes = self.slices.sizes(after, self.axes_at(node.outputs[0], length))
        is_kept = node.op_type == "Expand" or (constant is not None and _copies_same(constant, given, sizes))
        if constant is not None and not self._is_fixed and is_kept:
            return target
        if node.op_type == "Expand":
            shift = len(after) - len(before)
            kept = [place >= shift and before[place - shift] == size for place, size in enumerate(after)]
            return self.lengths.expand_target(sizes, kept)
        return self.lengths.reshape_target(sizes, given)

    def _parameter(self, node: ir.Node, index: int, value: ir.Value, length: Length) -> ir.Value:
        """Return bounds that depend on the length, at the length of their variable."""
        variable, fact = self.flow.parameters[node, index].resolved() or Length.TOTAL, self.flow.shapes[value]
        assert fact.value is not None
        resolved = length if variable is Length.NEW else variable
        at = np.frompyfunc(lambda number: self.lengths.at(number, resolved), 1, 1)
        return self.lengths.typed(self.lengths.array(np.asarray(at(fact.value), dtype=object)), fact.dtype)

    def _copies_zero(self, node: ir.Node) -> bool:
        """Return whether 0 in the new target of a `Reshape` must copy a dimension."""
        if node.op_type != "Reshape" or "allowzero" not in node.attributes:
            return False
        return constant_tensor(self.before[node][1]) is None or self._is_fixed

    @property
    def _is_fixed(self) -> bool:
        """Whether the export has a fixed length."""
        return isinstance(self.flow.length, int)


def _copies_same(target: ir.TensorProtocol, before: Sequence[Dimension], after: Sequence[Dimension]) -> bool:
    """Return whether each 0 in the target of a `Reshape` still copies the same dimension."""
    zeros: list[int] = np.flatnonzero(target.numpy() == 0).tolist()
    return all(place >= len(before) or before[place] == after[place] for place in zeros)


def _at(axis: SequenceAxis, length: Length) -> SequenceAxis:
    """Return an axis for a node on tokens of a length: one of the new tokens gets it, one of the keys is total."""
    if length is Length.TOTAL and axis.variable.resolved() is Length.NEW:
        return axis.with_variable(_TOTAL)
    return axis
