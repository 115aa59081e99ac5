"""How a view of an operator's result is made of views of its inputs: one rule for each operator.

A rule returns None where it does not reach; the whole is computed and sliced then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.ops.gather import slice_bounds
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.reduction import reduced_axes
from kvsurgeon.ops.table import contraction_of, names_with
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import NEW, PAST, Dimension
from kvsurgeon.symbolic.fact import OperatorCall, axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis, follow_reshape


class Maker(Protocol):
    """What a rule may ask for."""

    flow: TokenFlow
    editor: Editor
    lengths: LengthValues
    shortened: bool  # whether the export fixed a length that context is not computed for

    def view(self, value: ir.Value, axes: Axes = ()) -> ir.Value:
        """Return the value with each of these axes at the length of its role."""

    def sliced(self, value: ir.Value, axes: Axes) -> ir.Value:
        """Return the value, computed whole, cut to the length of each of these axes."""

    def rebuilt(self, node: ir.Node, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Return the output of a node like this one with other inputs."""

    def given_axes(self, value: ir.Value) -> Axes:
        """Return where the tokens of an input lie in what is only it in another form, at a fixed length."""

    def sizes(self, shape: Sequence[Dimension], axes: Axes) -> list[Dimension]:
        """Return dimensions at the lengths that the axes ask for."""


Rule = Callable[[Maker, ir.Node, OperatorCall, Axes], "ir.Value | None"]

_TOTAL = LengthVariable(Length.TOTAL)
TO_THE_END = 2**31 - 1  # the largest end that an int32 holds as well
WHOLE_NUMBERS = (ir.DataType.INT64, ir.DataType.INT32)


def _narrow(shape: Sequence[Dimension] | None, axes: Axes, shift: int) -> Axes:
    """What an operand that is broadcast owes to the result's axes: nothing where it has one place or none."""
    if shape is None:
        return ()
    return tuple(axis.at(axis.axis - shift) for axis in axes if axis.axis >= shift and shape[axis.axis - shift] != 1)


def _elementwise(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    rank = views.flow.shapes[node.outputs[0]].rank
    if rank is None:
        return None
    inputs: list[ir.Value | None] = []
    for index, source in enumerate(node.inputs):
        shape = call.fact(index).shape
        if source is None:
            inputs.append(source)
            continue
        if shape is None:
            return None
        inputs.append(views.view(source, _narrow(shape, axes, rank - len(shape))))
    return views.rebuilt(node, inputs)


def _first_only(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    source = node.inputs[0]
    if source is None or call.fact(0).rank != views.flow.shapes[node.outputs[0]].rank:
        return None
    rest = [None if value is None else views.view(value) for value in node.inputs[1:]]
    if node.op_type == "CastLike":
        rest = list(node.inputs[1:])  # of which only the type is read
    return views.rebuilt(node, [views.view(source, axes), *rest])


def _unsqueeze(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    before, after = call.fact(0).shape, views.flow.shapes[node.outputs[0]].shape
    source = node.inputs[0]
    if before is None or after is None or source is None:
        return None
    kept = [place for place, size in enumerate(before) if size != 1]
    then = [place for place, size in enumerate(after) if size != 1]
    if len(kept) != len(then):
        return None
    back = dict(zip(then, kept, strict=True))
    if any(axis.axis not in back for axis in axes):
        return None
    rest = list(node.inputs[1:])
    return views.rebuilt(node, [views.view(source, tuple(axis.at(back[axis.axis]) for axis in axes)), *rest])


def _transpose(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    source, rank = node.inputs[0], call.fact(0).rank
    if source is None or rank is None:
        return None
    order = call.attribute("perm") or tuple(reversed(range(rank)))
    wanted = _sorted(tuple(axis.at(order[axis.axis]) for axis in axes))
    return views.rebuilt(node, [views.view(source, wanted)])


def _reshape(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    before, after = call.fact(0).shape, views.flow.shapes[node.outputs[0]].shape
    source = node.inputs[0]
    if before is None or after is None or source is None:
        return None
    wanted = follow_reshape(axes, after, before, views.flow.length)
    if wanted is None or not _known(after):
        return None
    made = views.view(source, _sorted(wanted))
    if node.op_type == "Flatten":
        return views.rebuilt(node, [made])
    target = views.lengths.vector(views.sizes(after, axes))
    return views.rebuilt(node, [made, target])


def _known(shape: Sequence[Dimension]) -> bool:
    return all(dim.is_known(size) for size in shape)


def _expand(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    before, after = call.fact(0).shape, views.flow.shapes[node.outputs[0]].shape
    source = node.inputs[0]
    if before is None or after is None or source is None or not _known(after):
        return None
    made = views.view(source, _narrow(before, axes, len(after) - len(before)))
    return views.rebuilt(node, [made, views.lengths.vector(views.sizes(after, axes))])


def _constant_of_shape(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    after = views.flow.shapes[node.outputs[0]].shape
    if after is None or not _known(after):
        return None
    return views.rebuilt(node, [views.lengths.vector(views.sizes(after, axes))])


def _concat(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    rank = views.flow.shapes[node.outputs[0]].rank
    if rank is None:
        return None
    joined = axis_of(call.integer("axis", 0), rank)
    if any(axis.axis == joined for axis in axes):
        return None
    return views.rebuilt(node, [None if source is None else views.view(source, axes) for source in node.inputs])


def _check_address(views: Maker, value: ir.Value) -> None:
    """Numbers that pick from a mask flattened with its batch hold for the exported length only."""
    if views.shortened and any(axis.outer != 1 for axis in views.given_axes(value)):
        raise UnsupportedError(
            "a mask is read by numbers that hold for the exported length only", at=value.name,
            expected="its sequence axis kept apart", hint="export with dynamic axes",
        )  # fmt: skip


def _gather(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    table, indices = node.inputs[0], node.inputs[1]
    rank, picked = call.fact(0).rank, call.fact(1).rank
    if table is None or indices is None or rank is None or picked is None:
        return None
    _check_address(views, table)
    at = axis_of(call.integer("axis", 0), rank)
    for_indices = tuple(axis.at(axis.axis - at) for axis in axes if at <= axis.axis < at + picked)
    for_table = tuple(
        axis if axis.axis < at else axis.at(axis.axis - picked + 1)
        for axis in axes
        if not at <= axis.axis < at + picked
    )
    return views.rebuilt(node, [views.view(table, for_table), views.view(indices, for_indices)])


def _gather_nd(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    data, indices, rank = node.inputs[0], node.inputs[1], call.fact(1).rank
    if data is None or indices is None or rank is None or call.integer("batch_dims", 0):
        return None
    if any(axis.axis >= rank - 1 for axis in axes):
        return None
    _check_address(views, data)
    return views.rebuilt(node, [views.view(data), views.view(indices, axes)])


def _slice(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    bounds, source = slice_bounds(call), node.inputs[0]
    before, after = call.fact(0).shape, views.flow.shapes[node.outputs[0]].shape
    if bounds is None or source is None or before is None or after is None or len(node.inputs) < 3:
        return None
    starts, ends = dict(zip(bounds[0], bounds[1], strict=True)), dict(zip(bounds[0], bounds[2], strict=True))
    steps = dict(zip(bounds[0], bounds[3], strict=True))
    wanted = []
    for axis in axes:
        if axis.axis not in starts or (starts[axis.axis] == 0 and dim.is_equal(before[axis.axis], after[axis.axis])):
            wanted.append(axis)
            continue
        start = starts[axis.axis]
        if steps[axis.axis] != 1 or not axis.is_plain or dim.is_less(start, 0) or not dim.is_known(start):
            return None
        start = views.lengths.at(start, Length.TOTAL)
        first, last = views.lengths.span(axis.role.resolved() or Length.TOTAL)
        starts[axis.axis], ends[axis.axis] = dim.add(start, first), dim.add(start, last)
    others, whole = {axis.axis for axis in axes}, Length.TOTAL
    at_total = [starts[place] if place in others else views.lengths.at(starts[place], whole) for place in bounds[0]]
    at_end = [ends[place] if place in others else views.lengths.at(ends[place], whole) for place in bounds[0]]
    for axis in wanted:
        if axis.axis in starts:
            place = bounds[0].index(axis.axis)
            at_total[place], at_end[place] = 0, TO_THE_END
    made = [views.view(source, tuple(wanted))]
    for numbers, index in ((at_total, 1), (at_end, 2)):
        made.append(views.lengths.typed(views.lengths.vector(numbers), call.fact(index).dtype))
    return views.rebuilt(node, [*made, *node.inputs[3:]])


def _range(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    start, delta = call.numbers(0), call.numbers(2)
    fact = views.flow.shapes[node.outputs[0]]
    if start is None or delta != (1,) or fact.shape is None or fact.dtype not in WHOLE_NUMBERS:
        return None
    first, extent = views.lengths.at(start[0], Length.TOTAL), views.lengths.at(fact.shape[0], Length.TOTAL)
    if axes and views.shortened:
        extent = views.lengths.total
    if not dim.is_known(extent) or not dim.is_known(first):
        return None
    if axes and axes[0].role.resolved() is Length.NEW:
        if not axes[0].is_plain:
            return None
        first, extent = dim.add(first, PAST), NEW
    limit = dim.add(first, extent)
    inputs = [views.lengths.typed(views.lengths.scalar(end), fact.dtype) for end in (first, limit)] + [node.inputs[2]]
    return views.rebuilt(node, inputs)


def _trilu(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    source, rank = node.inputs[0], call.fact(0).rank
    offset = call.numbers(1) if len(node.inputs) > 1 and node.inputs[1] is not None else (0,)
    if source is None or rank is None or offset is None:
        return None
    diagonal = views.lengths.at(offset[0], Length.TOTAL)
    for axis in axes:
        if axis.role.resolved() is Length.NEW and axis.axis >= rank - 2:
            if not axis.is_plain:
                return None
            diagonal = dim.add(diagonal, PAST) if axis.axis == rank - 2 else dim.subtract(diagonal, PAST)
    return views.rebuilt(node, [views.view(source, axes), views.lengths.scalar(diagonal)])


def _eye_like(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    fact = views.flow.shapes[node.outputs[0]]
    if fact.shape is None or fact.dtype is None or not _known(fact.shape) or not all(axis.is_plain for axis in axes):
        return None
    starts: list[Dimension] = [call.integer("k", 0), 0]
    for axis in axes:
        if axis.role.resolved() is Length.NEW:
            starts[axis.axis] = dim.add(starts[axis.axis], PAST)
    sizes, lengths = views.sizes(fact.shape, axes), views.lengths
    places = []
    for start, size in zip(starts, sizes, strict=True):
        ends = [lengths.scalar(number) for number in (start, dim.add(start, size), 1)]
        places.append(views.editor.node("Range", ends, name="places", dtype=ir.DataType.INT64))
    column = views.editor.node("Reshape", [places[0], lengths.vector([-1, 1])], name="rows", dtype=ir.DataType.INT64)
    same = views.editor.node("Equal", [column, places[1]], name="diagonal", dtype=ir.DataType.BOOL)
    return views.editor.node(
        "Cast", [same], {"to": int(fact.dtype)}, name=f"{node.outputs[0].name}.eye", dtype=fact.dtype
    )


def _cumulative(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    along, rank, source = call.numbers(1), call.fact(0).rank, node.inputs[0]
    if along is None or rank is None or source is None or not isinstance(along[0], int):
        return None
    place = axis_of(along[0], rank)
    inside = tuple(axis for axis in axes if axis.axis != place)
    summed = tuple(SequenceAxis(axis.axis, _TOTAL) for axis in axes if axis.axis == place)
    whole = views.rebuilt(node, [views.view(source, _sorted((*inside, *summed))), node.inputs[1]])
    return views.sliced(
        whole, tuple(axis for axis in axes if axis.axis == place and axis.role.resolved() is Length.NEW)
    )


def _sorted(axes: Axes) -> Axes:
    return tuple(sorted(axes, key=lambda axis: axis.axis))


def _reduce(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    gone, source, rank = reduced_axes(call), node.inputs[0], call.fact(0).rank
    if gone is None or source is None or rank is None:
        return None
    keep = call.integer("keepdims", 1)
    left = [place for place in range(rank) if keep or place not in gone]
    wanted = tuple(axis.at(left[axis.axis]) for axis in axes)
    if any(axis.axis in gone for axis in wanted):
        return None
    return views.rebuilt(node, [views.view(source, wanted), *node.inputs[1:]])


def _contraction(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    found = contraction_of(call)
    if found is None:
        return None
    inputs = list(node.inputs)
    for index, labels in ((found.left, found.left_labels), (found.right, found.right_labels)):
        shape, source = call.fact(index).shape, inputs[index]
        if shape is None or source is None:
            return None
        wanted = []
        for axis in axes:
            label = found.result_labels[axis.axis]
            if label in labels and shape[labels.index(label)] != 1:
                wanted.append(axis.at(labels.index(label)))
        inputs[index] = views.view(source, _sorted(tuple(wanted)))
    for index, source in enumerate(inputs):
        if index not in (found.left, found.right) and source is not None:
            shape = call.fact(index).shape
            shift = len(found.result_labels) - len(shape or ())
            inputs[index] = views.view(source, _narrow(shape, axes, shift))
    return views.rebuilt(node, inputs)


def _tile(views: Maker, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    repeats, source = call.numbers(1), node.inputs[0]
    if repeats is None or source is None or any(repeats[axis.axis] != 1 for axis in axes):
        return None
    numbers = [views.lengths.at(times, Length.TOTAL) for times in repeats]
    return views.rebuilt(node, [views.view(source, axes), views.lengths.vector(numbers)])


RULES: dict[str, Rule] = {
    **dict.fromkeys(names_with(Trait.BROADCAST), _elementwise),
    **dict.fromkeys(names_with(Trait.ELEMENTWISE) - {"Trilu", "BiasGelu", "FastGelu"}, _first_only),
    "Cast": _first_only,
    "CastLike": _first_only,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _unsqueeze,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Concat": _concat,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Slice": _slice,
    "Range": _range,
    "Trilu": _trilu,
    "EyeLike": _eye_like,
    "CumSum": _cumulative,
    "Tile": _tile,
    **{f"Reduce{kind}": _reduce for kind in
       ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
    **dict.fromkeys(("MatMul", "Gemm", "Einsum", "FusedMatMul"), _contraction),
}  # fmt: skip
