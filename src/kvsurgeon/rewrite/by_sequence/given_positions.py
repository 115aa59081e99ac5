"""Context at given positions: token i has the row of the position that an input gives for it.

Context that meets token data has a row for each token, which depends on the token's index. At given positions the rows
of all sequences of a batch are computed on one axis, `[..., length, ...]` as `[..., batch * length, ...]`, by the rules
that slice context; a batch axis that the context has already becomes 1. The rows are gathered from a range, which they
replace, from a table, or from a value whose operator has no rule, which is computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.graph.query import is_operator
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import AxisLinks, Trait
from kvsurgeon.ops.table import find_links, has_trait
from kvsurgeon.resizing.context_slices import ContextSlices
from kvsurgeon.resizing.lengths import LengthValues, sources_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, NEW, Dimension
from kvsurgeon.symbolic.fact import OperatorCall
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

ROTARY = "RotaryEmbedding"
ATTENTION = "Attention"
MASK_RANK = 4  # of a mask of Attention: [batch, heads, queries, keys]
BATCHED_GATHER = 12  # first opset of GatherND with batch_dims

Use = tuple[ir.Node, int, int]  # a node on tokens, the index of its context input, the sequence axis of that
Rule = Callable[["GivenPositions", ir.Node, int], "ir.Value | None"]


class GivenPositions(ContextSlices):
    """Context at given positions, each value computed once: the new length is that of all rows of a batch.

    Attributes:
        positions: int64 `[batch, length]`.
        rows: The same as a vector.
    """

    def __init__(self, analysis: Analysis, editor: Editor, positions: ir.Value) -> None:
        """Take the positions, int64 `[batch, length]`.

        Raises:
            UnsupportedError: The batch size is fixed, and another axis could have the same.
        """
        flow = analysis.flow
        if isinstance(flow.batch, int) and flow.batch > 1:
            raise UnsupportedError(
                "the batch size is fixed, and another axis of context can have the same",
                code=Code.PASS_PRECONDITION, at=positions.name, expected="a symbol, or 1", found=str(flow.batch),
                hint="export with a dynamic batch",
            )  # fmt: skip
        self.positions = positions
        self.rows = editor.node("Reshape", [positions, editor.constant([-1])], name="rows", dtype=positions.dtype)
        sources = {NEW: (self.rows, 0), **sources_of({positions: (flow.batch, flow.length)})}
        lengths = LengthValues(editor, sources, total=flow.length)
        super().__init__(flow, editor, lengths, analysis.inputs, analysis.same)

    def at_positions(self, value: ir.Value, axis: int) -> ir.Value:
        """Return the value with the rows of the given positions along `axis`, and a batch axis of size 1.

        Raises:
            UnsupportedError: It depends on the text already.
        """
        return self.slice_of(value, (SequenceAxis(axis, LengthVariable(Length.NEW)),))

    def slice_of(self, value: ir.Value, axes: Axes = ()) -> ir.Value:
        """Return the value with rows at the positions; the value itself if no axis has rows."""
        axes = tuple(axis for axis in axes if axis.variable.resolved() is Length.NEW)
        if len(axes) > 1 or not all(axis.is_plain for axis in axes):
            raise UnsupportedError("rows share an axis", at=value.name, code=Code.PASS_PRECONDITION)
        return super().slice_of(value, axes) if axes else value

    def sliced(self, value: ir.Value, axes: Axes, of: ir.Value | None = None) -> ir.Value:
        """Return the rows of a value that is computed whole."""
        if not axes:
            return value
        (row,) = axes
        fact, shape, batched = self.fact(value), self.shape(value), self.has_batch(value)
        if self._has_other_batch(shape) or (batched and self.editor.opset < BATCHED_GATHER):
            raise UnsupportedError(
                "context that depends on the text cannot be gathered by positions",
                at=value.name,
                code=Code.PASS_PRECONDITION,
            )
        if not batched:
            return self.node("Gather", [value, self.rows], fact.dtype, axis=row.axis)
        order = [0, row.axis, *(place for place in range(1, len(shape)) if place != row.axis)]
        places = self.with_axes("Unsqueeze", self.positions, [2])
        rows = self.node("GatherND", [self._transposed(value, order), places], fact.dtype, batch_dims=1)
        back = self._transposed(rows, [order.index(place) for place in range(len(shape))])
        return self._regrouped(back, self.sizes(shape, axes), row.axis)

    def sizes(self, shape: Sequence[Dimension], axes: Axes) -> list[Dimension]:
        """Return dimensions with the number of rows along an axis, and a batch axis of size 1."""
        sizes = super().sizes(shape, axes)
        return [1, *sizes[1:]] if axes and shape[:1] == (self.flow.batch,) else sizes

    def has_batch(self, value: ir.Value) -> bool:
        """Return whether a value of the graph has a batch axis, which is the first one."""
        return self.flow.batch != 1 and self.shape(value)[:1] == (self.flow.batch,)

    def shape(self, value: ir.Value) -> tuple[Dimension, ...]:
        """Return the value's dimensions.

        Raises:
            UnsupportedError: The rank is unknown.
        """
        shape = self.fact(value).shape
        if shape is None:
            raise UnsupportedError(
                "context of unknown rank cannot be gathered by positions", at=value.name, code=Code.PASS_PRECONDITION
            )
        return shape

    def at_tokens(self, node: ir.Node, index: int, axis: int) -> ir.Value:
        """Return an input of a node at the given positions, with its batch axis aligned with that of the token data.

        Raises:
            UnsupportedError: The node has no batch axis.
        """
        value, batch = node.inputs[index], self.flow.batch
        assert value is not None
        if batch == 1:
            return self.at_positions(value, axis)
        shape, result = self.shape(value), self.shape(node.outputs[0])
        aligned = {ROTARY: len(shape), ATTENTION: MASK_RANK}.get(node.op_type)
        if has_trait(node, Trait.BROADCAST):
            aligned = len(result) - [*result, batch].index(batch)
        if aligned is None or len(shape) > aligned or (len(shape) == aligned and shape[0] not in (1, batch)):
            raise UnsupportedError(
                f"{node.op_type}: context meets token data without a batch axis",
                at=value.name,
                code=Code.PASS_PRECONDITION,
            )
        made, added = self.at_positions(value, axis), aligned - len(shape)
        sizes = [1] * added + list(shape)
        sizes[0], sizes[axis + added] = batch, self.flow.length
        if added and any(size != 1 for size in sizes[1 : axis + added]):
            made = self.with_axes("Unsqueeze", made, list(range(added)))
        return self._regrouped(made, sizes, axis + added)

    def node(
        self, operator: str, inputs: Sequence[ir.Value | None], dtype: ir.DataType | None, **attributes: object
    ) -> ir.Value:
        """Add a node and return its output."""
        return self.editor.node(operator, inputs, attributes, name=f"placed.{operator}", dtype=dtype)

    def with_axes(self, operator: str, made: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Add a `Squeeze` or an `Unsqueeze`."""
        result = NodeBuilder(self.editor, "placed").with_axes(operator, made, axes)
        result.type = made.type
        return result

    def _regrouped(self, value: ir.Value, sizes: Sequence[Dimension], axis: int) -> ir.Value:
        """Divide the elements of the first axis and another one in another way between them."""
        order = list(range(len(sizes)))
        if any(size != 1 for size in sizes[1:axis]):
            order = [0, axis, *(place for place in order[1:] if place != axis)]
        target = self.lengths.reshape_target([sizes[place] for place in order])
        divided = self.node("Reshape", [self._transposed(value, order), target], value.dtype)
        return self._transposed(divided, [order.index(place) for place in range(len(sizes))])

    def _transposed(self, value: ir.Value, order: list[int]) -> ir.Value:
        return value if order == sorted(order) else self.node("Transpose", [value], value.dtype, perm=order)

    def _of_input(self, value: ir.Value, axes: Axes) -> ir.Value:
        return self.sliced(value, axes)

    def _whole(self, node: ir.Node, value: ir.Value) -> ir.Value:
        return value

    def _resized(self, node: ir.Node, value: ir.Value, axes: Axes) -> ir.Value | None:
        """The node on rows; None if its result must be computed whole."""
        call, rule = self.flow.shapes.call(node), _RULES.get(node.op_type)
        repeats = call.numbers(1) if node.op_type == "Tile" else ()
        if self._has_other_batch(self.shape(value)) or repeats is None or self._has_other_batch((1, *repeats)):
            return None  # the number of sequences is 1 in a shape, not among repeats
        if self._mixes_sequences(node, find_links(call)):
            return None
        try:
            made = None if rule is None else rule(self, node, axes[0].axis)
            return super()._resized(node, value, axes) if made is None else made
        except UnsupportedError:
            return None

    def _mixes_sequences(self, node: ir.Node, links: AxisLinks | None) -> bool:
        """Return whether the elements of a result depend on those of several sequences."""
        for source, labels in zip(node.inputs, () if links is None else links.inputs, strict=False):
            if source is not None and labels and self.has_batch(source):
                assert links is not None
                if labels[0] in {None, links.joined, *links.mixed, *links.blocked, *links.selected}:
                    return True
        return False

    def _has_other_batch(self, sizes: Sequence[Dimension]) -> bool:
        """Return whether a size other than that of the first axis depends on the number of sequences."""
        others = sizes[self.flow.batch != 1 and sizes[:1] == (self.flow.batch,) :]
        return any(not isinstance(size, int) and dim.contains(size, BATCH) for size in others)

    def _linked_inputs(
        self,
        node: ir.Node,
        value: ir.Value,
        call: OperatorCall,
        links: AxisLinks,
        axes: Axes,
        type_only: frozenset[int],
    ) -> list[ir.Value | None] | None:
        inputs = super()._linked_inputs(node, value, call, links, axes, type_only)
        if inputs is None or (links.diagonal and links.outputs[0][axes[0].axis] in links.diagonal):
            return None
        aligned = has_trait(node, Trait.BROADCAST)
        for index, (source, made) in enumerate(zip(node.inputs, inputs, strict=True)):
            if source is None or index in type_only or index == links.target or not self.has_batch(source):
                continue
            labels = links.inputs[index]
            if labels is None or labels[0] != links.outputs[0][0]:
                return None
            if made is source and (aligned or has_trait(node, Trait.BATCHED_MATMUL)):
                inputs[index] = self._of_one_sequence(source)
                if inputs[index] is None and aligned:
                    inputs[index] = self._repeated(source, axes[0].axis, len(self.shape(value)))
            if inputs[index] is None or inputs[index] is source:
                return None
        return inputs

    def _of_one_sequence(self, value: ir.Value) -> ir.Value | None:
        """Return what is repeated for each sequence of a batch; None if that is not known."""
        node = value.producer()
        source = None if node is None else node.inputs[0]
        if node is None or source is None:
            return None
        if has_trait(node, Trait.IDENTITY):
            made = self._of_one_sequence(source)
            return None if made is None else self.rebuilt(node, [made, *node.inputs[1:]], value)
        is_one = self.shape(source) == (1, *self.shape(value)[1:])
        return source if is_one and has_trait(node, Trait.REPEAT) else None

    def _repeated(self, value: ir.Value, axis: int, rank: int) -> ir.Value | None:
        """Return context of each sequence that has one row for all tokens, as a row for each."""
        shape = self.shape(value)
        if len(shape) != rank or axis == 0 or shape[axis] != 1:
            return None
        target = self.lengths.vector([self.flow.length if place == axis else 1 for place in range(rank)])
        rows = self.node("Expand", [value, target], self.fact(value).dtype)
        return self._regrouped(rows, [1, *shape[1:axis], NEW, *shape[axis + 1 :]], axis)


def _range(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    call = gathering.flow.shapes.call(node)
    if call.numbers(0) != (0,) or call.numbers(2) != (1,):
        return None
    return gathering.lengths.typed(gathering.rows, call.result.dtype)


def _trilu(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Rows of a triangle: their positions are compared with the indices of the columns."""
    call, source, shape = gathering.flow.shapes.call(node), node.inputs[0], gathering.shape(node.outputs[0])
    offset = call.numbers(1) if len(node.inputs) > 1 and node.inputs[1] is not None else (0,)
    dtype, rank, lengths = call.result.dtype, len(shape), gathering.lengths
    if source is None or dtype is None or offset is None or not isinstance(offset[0], int) or axis < rank - 2:
        return None
    made, op = gathering.at_positions(source, axis), NodeBuilder(gathering.editor, "placed")
    indices = op.Range(lengths.scalar(0), lengths.scalar(shape[2 * rank - 3 - axis]), lengths.scalar(1))
    rows, columns = (gathering.rows, indices) if axis == rank - 2 else (indices, gathering.rows)
    cut = op.Less if call.integer("upper", 1) else op.Greater
    hidden = cut(op.Sub(columns, op.with_axes("Unsqueeze", rows, [1])), op.int64(offset[0]))
    if dtype is ir.DataType.BOOL:  # onnxruntime has no Where of it
        return gathering.node("And", [op.Not(hidden), made], dtype)
    return gathering.node("Where", [hidden, op.number(0, dtype), made], dtype)


def _slice(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Rows of a table with one for each token: columns are cut before the rows are gathered."""
    call, source = gathering.flow.shapes.call(node), node.inputs[0]
    bounds, before, after = slice_bounds(call), call.fact(0).shape, gathering.shape(node.outputs[0])
    if bounds is None or source is None or before is None or len(node.inputs) < 3 or gathering.has_batch(source):
        return None
    axes, starts, _, steps = bounds
    moved = [(start, step) != (0, 1) for start, step in zip(starts, steps, strict=True)]
    cut = [index for index, place in enumerate(axes) if moved[index] or before[place] != after[place]]
    table = _table(gathering, node, axis)
    if table is None or any(moved[index] and after[axes[index]] == gathering.flow.length for index in cut):
        return None
    others = [index for index in cut if axes[index] != axis]
    if others:
        op, dtype = NodeBuilder(gathering.editor, "placed"), call.fact(1).dtype or ir.DataType.INT64
        given = [None if one is None else op.Gather(one, op.int64(others)) for one in node.inputs[1:]]
        places = op.constant(np.array([axes[index] for index in others], dtype.numpy()))
        table = gathering.rebuilt(node, [table, *given[:2], places, *given[3:]])
    return gathering.node("Gather", [table, gathering.rows], call.result.dtype, axis=axis)


def _table(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Return what a `Slice`, and perhaps one before it, keeps a row of for each token along an axis."""
    source, bounds = node.inputs[0], slice_bounds(gathering.flow.shapes.call(node))
    above = None if source is None else source.producer()
    if bounds is None or axis in bounds[0]:
        return source
    rows = slice_bounds(gathering.flow.shapes.call(above)) if is_operator(above, "Slice") and above else None
    is_rows = above is not None and rows is not None and (rows[0], rows[1], rows[3]) == ([axis], [0], [1])
    return above.inputs[0] if is_rows and above is not None else None


def _gather(gathering: GivenPositions, node: ir.Node, axis: int) -> ir.Value | None:
    """Rows of context that has one for each token, such as a table cut to the length."""
    (table, picked), length = node.inputs, gathering.flow.length
    if table is None or picked is None or gathering.flow.kinds.get(table) is not ValueKind.CONTEXT:
        return None
    rows, order = gathering.shape(table), gathering.shape(picked)
    is_first = gathering.flow.shapes.call(node).integer("axis", 0) == 0 and rows[:1] == (length,)
    if not is_first or dim.product(order) != length:
        return None
    looked_up, made = copy(gathering), gathering.at_positions(picked, axis)
    looked_up.rows = gathering.node("Reshape", [made, gathering.editor.constant([-1], name="form")], made.dtype)
    looked_up._made = {}
    sizes = [*(NEW if size == length else size for size in order), *rows[1:]]
    found = looked_up.at_positions(table, 0)
    return gathering.node("Reshape", [found, gathering.lengths.reshape_target(sizes)], found.dtype)


_RULES: dict[str, Rule] = {"Gather": _gather, "Range": _range, "Slice": _slice, "Trilu": _trilu}


def shape_of_tokens(analysis: Analysis) -> ir.Shape:
    """Return `[batch, length]`, with the declared dimensions of the token input."""
    tokens = next(given for given in analysis.inputs if given.is_token)
    (length,) = tokens.lengths
    sizes = list(tokens.value.shape or ())
    batch = next((size for axis, size in enumerate(sizes[:length]) if axis not in tokens.lengths), 1)
    return ir.Shape([batch, sizes[length]])


def context_of_new_tokens(analysis: Analysis, *, masks: bool) -> list[Use]:
    """Return where token data is combined with context that has a row for each new token.

    Args:
        analysis: Analysis of a model without a cache.
        masks: Whether to return the uses inside attention too.
    """
    flow, found = analysis.flow, []
    inside = {node for site in analysis.sites for node in site.upstream_of_weights | site.ends}
    for (node, index), axes in flow.demands.items():
        value = node.inputs[index]
        if value is None or flow.kinds.get(value) is not ValueKind.CONTEXT or (node in inside and not masks):
            continue
        if flow.targets.get(node) == index or (node, index) in flow.parameters:
            continue
        rows = [axis for axis in axes if axis.variable.resolved() is Length.NEW]
        if len(rows) == 1 and rows[0].is_plain and (masks or len(axes) == 1):
            found.append((node, index, rows[0].axis))
    return found
