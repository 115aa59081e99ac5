"""Token data at the two lengths: nodes read what has the right one; what the cache makes whole is computed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.context_slices import ContextSlices
from kvsurgeon.rewrite.dimension_names import dim_names
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.rewrite.reshape_targets import expand_target, reshape_target
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import PAST, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

_TOTAL = LengthVariable(Length.TOTAL)


class TokenRewriter:
    """Rewires the nodes on token data."""

    def __init__(
        self,
        flow: TokenFlow,
        editor: Editor,
        lengths: LengthValues,
        views: ContextSlices,
        before: Mapping[ir.Node, tuple[ir.Value | None, ...]],
    ) -> None:
        """Take what was learnt, and each node's inputs as they were before surgery."""
        self.flow = flow
        self.editor = editor
        self.lengths = lengths
        self.views = views
        self.before = before
        self._whole: dict[ir.Value, ir.Value] = {}

    def remember(self, value: ir.Value, whole: ir.Value) -> None:
        """Let everything downstream that needs all tokens so far read `whole` in place of `value`."""
        self._whole[value] = whole

    def rewire(self, node: ir.Node) -> None:
        """Let a node read, at the new length, what has the right one; inside an island everything has."""
        if node in self.flow.routed_regions:
            return
        for index, value in enumerate(self._inputs(node, Length.NEW)):
            self.editor.replace_input(node, index, value)
        if self._drops_allowzero(node):
            self.editor.remove_attribute(node, "allowzero")
        if node in self.flow.diagonals:
            self._move_diagonal(node)

    def _move_diagonal(self, node: ir.Node) -> None:
        """The first new query stands in the row that the past is long."""
        given = self.flow.shapes.call(node).numbers(1)
        diagonal = self.lengths.at(given[0] if given else 0, Length.TOTAL)
        rows, columns = (role.resolved() for role in self.flow.diagonals[node])
        if rows is Length.NEW and columns is Length.TOTAL:
            diagonal = dim.add(diagonal, PAST)
        elif rows is Length.TOTAL and columns is Length.NEW:
            diagonal = dim.subtract(diagonal, PAST)
        if len(node.inputs) < 2:
            node.resize_inputs(2)
        self.editor.replace_input(node, 1, self.lengths.scalar(diagonal))

    def whole(self, value: ir.Value) -> ir.Value:
        """The value for all tokens so far: what was remembered, or what is computed from it."""
        if value not in self._whole:
            node = value.producer()
            if node is None:
                raise UnsupportedError("an input is needed for all tokens so far", at=value.name)
            without = frozenset({"allowzero"}) if self._drops_allowzero(node) else frozenset()
            twin = self.editor.copy(node, self._inputs(node, Length.TOTAL), "all", without)
            for mine, theirs in zip(node.outputs, twin.outputs, strict=True):
                self._whole[mine] = theirs
                self._describe(mine, theirs)
        return self._whole[value]

    def axes_at(self, value: ir.Value, length: Length) -> Axes:
        """The value's sequence axes, those of the stream at that length."""
        return tuple(_at(axis, length) for axis in self.flow.axes.get(value, ()))

    def _describe(self, original: ir.Value, twin: ir.Value) -> None:
        fact = self.flow.shapes.facts.get(original)
        if fact is not None and fact.shape is not None and fact.dtype is not None:
            twin.type = ir.TensorType(fact.dtype)
            twin.shape = ir.Shape(dim_names(self.views.sizes(fact.shape, self.axes_at(original, Length.TOTAL))))

    def _inputs(self, node: ir.Node, length: Length) -> list[ir.Value | None]:
        return [
            None if value is None else self._input(node, index, value, length)
            for index, value in enumerate(self.before[node])
        ]

    def _input(self, node: ir.Node, index: int, value: ir.Value, length: Length) -> ir.Value:
        if self.flow.kinds.get(value) is ValueKind.TOKEN:
            role = self.flow.operands.get((node, index))
            wanted = length if role is None else role.resolved()
            return self.whole(value) if wanted is Length.TOTAL else value
        if self.flow.targets.get(node) == index:
            return self._target(node, value, length)
        if (node, index) in self.flow.addresses:
            return value
        if (node, index) in self.flow.parameters:
            return self._parameter(node, index, value, length)
        axes = tuple(_at(axis, length) for axis in self.flow.demands.get((node, index), ()))
        return self.views.filling.as_rows(self.views.slice_of(value, axes), axes)

    def _target(self, node: ir.Node, target: ir.Value, length: Length) -> ir.Value:
        """The target of a `Reshape` or `Expand`, derived anew from the dimensions of its result."""
        source, fixed = self.before[node][0], constant_tensor(target)
        assert source is not None
        before, after = self.flow.shapes[source].shape or (), self.flow.shapes[node.outputs[0]].shape or ()
        given = self.views.sizes(before, self.axes_at(source, length))
        sizes = self.views.sizes(after, self.axes_at(node.outputs[0], length))
        if fixed is not None and not self._is_fixed and (node.op_type == "Expand" or _stays(fixed, given, sizes)):
            return target
        if node.op_type == "Expand":
            shift = len(after) - len(before)
            kept = [place >= shift and before[place - shift] == size for place, size in enumerate(after)]
            return expand_target(self.lengths, sizes, kept)
        return reshape_target(self.lengths, sizes, given)

    def _parameter(self, node: ir.Node, index: int, value: ir.Value, length: Length) -> ir.Value:
        """Bounds in which the length counts, at the length of their role."""
        role, fact = self.flow.parameters[node, index].resolved() or Length.TOTAL, self.flow.shapes[value]
        assert fact.value is not None
        meant = length if role is Length.NEW else role
        numbers = [self.lengths.at(number, meant) for number in fact.value.reshape(-1)]
        return self.lengths.typed(self.lengths.vector(numbers), fact.dtype)

    def _drops_allowzero(self, node: ir.Node) -> bool:
        """Whether 0 in the new target must mean "as before"."""
        if node.op_type != "Reshape" or "allowzero" not in node.attributes:
            return False
        return constant_tensor(self.before[node][1]) is None or self._is_fixed

    @property
    def _is_fixed(self) -> bool:
        """Whether the export fixed the length."""
        return isinstance(self.flow.length, int)


def _stays(target: ir.TensorProtocol, before: Sequence[Dimension], after: Sequence[Dimension]) -> bool:
    """Whether each 0 of a reshape's target still copies what it copied: queries and keys were equally many before."""
    kept: list[int] = np.flatnonzero(target.numpy() == 0).tolist()
    return all(place >= len(before) or before[place] == after[place] for place in kept)


def _at(axis: SequenceAxis, length: Length) -> SequenceAxis:
    """The axis as a node at that length sees it: the stream's follows, the keys' is total anyway."""
    if length is Length.TOTAL and axis.role.resolved() is Length.NEW:
        return axis.with_role(_TOTAL)
    return axis


def causal_mask(
    editor: Editor, lengths: LengthValues, keys: Sequence[ir.Value], queries: Sequence[ir.Value]
) -> ir.Value:
    """[sequence, total_sequence]: whether the key is not after the query; ranges are given as start, limit and step."""
    int64 = ir.DataType.INT64
    row = editor.node("Range", keys, name="keys", dtype=int64)
    column = editor.node("Range", queries, name="queries", dtype=int64)
    column = editor.node("Reshape", [column, lengths.vector([-1, 1])], name="queries.column", dtype=int64)
    return editor.node("LessOrEqual", [row, column], name="causal", dtype=ir.DataType.BOOL)
