"""Operators that select or overwrite elements at places given by numbers: slices, lookups, scatters."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.ops.layout import whole_numbers
from kvsurgeon.ops.operator import (
    AxisLinks,
    Label,
    Labels,
    Operator,
    Trait,
    entries,
    identity_links,
    parameters,
    rank_of,
)
from kvsurgeon.ops.resizing import TO_THE_END, Resizer
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall, axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length

FAR = 2**24  # no text is as long: a bound of at least this means "to the end"


def slice_bounds(call: OperatorCall) -> tuple[list[int], list[Dimension], list[Dimension], list[int]] | None:
    """Return axes, starts, ends and steps of a `Slice`; None where one is not known. Also for opset 1 to 9."""
    starts, ends = call.integers("starts", 1), call.integers("ends", 2)
    if starts is None or ends is None or call.fact(0).shape is None:
        return None
    rank = len(call.fact(0).shape or ())
    axes = (
        whole_numbers(call.integers("axes", 3)) if call.given(3) or call.attribute("axes") else list(range(len(starts)))
    )
    steps = whole_numbers(call.numbers(4)) if call.given(4) else [1] * len(starts)
    if axes is None or steps is None:
        return None
    return [axis_of(axis, rank) for axis in axes], list(starts), list(ends), steps


def _clamped(call: OperatorCall, bound: Dimension, size: Dimension) -> Dimension:
    """A start or an end of a `Slice`, counted from the front and kept inside the axis."""
    if isinstance(bound, int):
        return _clamped_number(bound, size)
    if dim.is_less(bound, 0):
        bound = dim.add(size, bound)
        if isinstance(bound, int):
            return max(0, bound)
        if isinstance(size, int) and dim.is_known(bound) and dim.is_less(bound, 0) is not False:
            call.bound(size)  # the end of a table, cut by length
    if dim.is_less(bound, size) or dim.is_equal(bound, size):
        return bound
    if dim.is_less(bound, size) is False:
        return size
    if isinstance(size, int) and dim.is_known(bound):
        call.bound(size)  # a table cut by length: it cannot serve more than it holds
        return bound
    return dim.minimum(bound, size)


def _clamped_number(bound: int, size: Dimension) -> Dimension:
    if isinstance(size, int):
        return max(0, min(bound + size if bound < 0 else bound, size))
    if bound >= FAR:
        return size
    if bound <= -FAR or bound == 0:
        return 0
    return dim.minimum(bound, size) if bound > 0 else dim.maximum(dim.add(size, bound), 0)


def slice_(call: OperatorCall) -> Fact:
    """`Slice`: a range of each named axis."""
    operand, bounds = call.fact(0), slice_bounds(call)
    if operand.shape is None:
        return Fact(None, operand.dtype)
    sizes = list(operand.shape)
    if bounds is None:
        axes = whole_numbers(call.integers("axes", 3))
        for axis in axes if axes is not None else range(len(sizes)):
            sizes[axis] = call.unknown()
        return Fact(tuple(sizes), operand.dtype)
    picks: list[slice] = [slice(None)] * len(sizes)
    concrete = True
    for axis, start, end, step in zip(*bounds, strict=True):
        if step < 0:
            picks[axis] = slice(start, end, step)
            if (counted := whole_numbers([start, end, sizes[axis]])) is not None:
                sizes[axis] = len(range(*picks[axis].indices(counted[2])))
            elif step != -1 or not _is_whole_reversal(start, end):
                sizes[axis], concrete = call.unknown(), False
            continue
        first, last = _clamped(call, start, sizes[axis]), _clamped(call, end, sizes[axis])
        extent = dim.subtract(last, first)
        if step > 1:
            extent = dim.floor_quotient(dim.add(extent, step - 1), step)
        sizes[axis] = dim.at_least_zero(extent)
        if isinstance(first, int) and isinstance(last, int):
            picks[axis] = slice(first, last, step)
        else:
            concrete = False
    value = operand.value[tuple(picks)] if operand.value is not None and concrete else None
    return Fact(tuple(sizes), operand.dtype, value)


def _is_whole_reversal(start: Dimension, end: Dimension) -> bool:
    return start == -1 and isinstance(end, int) and end <= -FAR


def _everywhere(table: Fact) -> Any:
    """The number of a table of equal numbers; None of other tables."""
    numbers = [] if table.value is None else list(table.value.reshape(-1))
    return numbers[0] if numbers and all(number == numbers[0] for number in numbers) else None


def gather(call: OperatorCall) -> Fact:
    """`Gather`: the indices' shape in place of one axis."""
    table, indices = call.fact(0), call.fact(1)
    if table.shape is None or indices.shape is None:
        return Fact(None, table.dtype)
    axis = axis_of(call.integer("axis", 0), len(table.shape))
    shape = table.shape[:axis] + indices.shape + table.shape[axis + 1 :]
    value = None
    if table.value is not None and indices.value is not None and whole_numbers(indices.value.reshape(-1)) is not None:
        index = indices.value.astype(np.int64)
        value = np.asarray(np.take(table.value, index, axis=axis), dtype=object)
    elif (everywhere := _everywhere(table)) is not None:
        sizes = whole_numbers(shape)
        value = np.full(sizes, everywhere, dtype=object) if sizes is not None and call.is_small(sizes) else None
    return Fact(shape, table.dtype, value)


def gather_block_quantized(call: OperatorCall) -> Fact:
    """`GatherBlockQuantized` of com.microsoft: a `Gather`, dequantized, of numbers packed along one axis."""
    table, indices = call.fact(0), call.fact(1)
    if table.shape is None or indices.shape is None:
        return Fact(None, call.fact(2).dtype)
    rank = len(table.shape)
    axis, packed = (axis_of(call.integer(name, default), rank) for name, default in _PACKED_AXES)
    sizes = list(table.shape)
    if table.dtype is ir.DataType.UINT8:
        sizes[packed] = dim.multiply(sizes[packed], 8 // call.integer("bits", 4))
    return Fact((*sizes[:axis], *indices.shape, *sizes[axis + 1 :]), call.fact(2).dtype)


_PACKED_AXES = (("gather_axis", 0), ("quantize_axis", 1))


def gather_elements(call: OperatorCall) -> Fact:
    """`GatherElements`: one element for each index."""
    return Fact(call.fact(1).shape, call.fact(0).dtype)


def gather_nd(call: OperatorCall) -> Fact:
    """`GatherND`: the last axis of the indices addresses the data."""
    data, indices = call.fact(0), call.fact(1)
    if data.shape is None or indices.shape is None or not isinstance(indices.shape[-1], int):
        return Fact(None, data.dtype)
    batch_axes, value = call.integer("batch_dims", 0), None
    is_known = indices.value is not None and whole_numbers(indices.value.reshape(-1)) is not None
    if data.value is not None and indices.value is not None and is_known and not batch_axes:
        places = np.moveaxis(indices.value.astype(np.int64), -1, 0)
        value = np.asarray(data.value[tuple(places)], dtype=data.value.dtype)
    return Fact(indices.shape[:-1] + data.shape[batch_axes + indices.shape[-1] :], data.dtype, value)


def scatter(call: OperatorCall) -> Fact:
    """`ScatterND`, `ScatterElements`: the data with places overwritten."""
    data, indices, updates = call.fact(0), call.fact(1), call.fact(2)
    value = None
    if (
        call.node.op_type == "ScatterND"
        and call.text("reduction", "none") == "none"
        and data.value is not None
        and updates.value is not None
        and indices.value is not None
        and whole_numbers(indices.value.reshape(-1)) is not None
    ):
        value = data.value.copy()
        for place in np.ndindex(indices.value.shape[:-1]):
            value[tuple(int(index) for index in indices.value[place])] = updates.value[place]
    return Fact(data.shape, data.dtype, value)


def slice_links(call: OperatorCall) -> AxisLinks:
    """`Slice`: a range of each named axis."""
    labels, bounds = identity_links(call), slice_bounds(call)
    inputs = parameters(call, labels)
    if bounds is None:
        named = whole_numbers(call.integers("axes", 3))
        cut = labels if named is None else tuple(axis_of(int(axis), len(labels)) for axis in named)
        reason = "its bounds along the sequence are unknown"
        return AxisLinks(
            inputs=inputs, outputs=(labels,), blocked=dict.fromkeys((one for one in cut if one is not None), reason)
        )
    sizes = call.fact(0).shape or ()
    selected: dict[Label, tuple[Dimension, Dimension, int]] = {
        axis: (0 if dim.is_equal(dim.add(start, sizes[axis]), 0) else start, end, step)  # -size: the first element
        for axis, start, end, step in zip(*bounds, strict=True)
    }
    lengths = [(index, axis) for axis in selected for index in (1, 2)]
    return AxisLinks(inputs=inputs, outputs=(labels,), selected=selected, length_inputs=lengths)


def gather_links(call: OperatorCall) -> AxisLinks:
    """`Gather`: the axes of the indices replace one axis of the table."""
    rank = rank_of(call, 0)
    axis = axis_of(call.integer("gather_axis", call.integer("axis", 0)), rank)
    table: Labels = tuple(range(rank))
    indices: Labels = tuple(f"index {place}" for place in range(rank_of(call, 1)))
    result = (*table[:axis], *indices, *table[axis + 1 :])
    return AxisLinks(inputs=parameters(call, table, indices), outputs=(result,), addressing="rows")


def gather_elements_links(call: OperatorCall) -> AxisLinks:
    """`GatherElements`, `ScatterElements`: all axes alike but one, along which the indices address."""
    labels = identity_links(call)
    axis = axis_of(call.integer("axis", 0), len(labels))
    return AxisLinks(
        inputs=(labels,) * len(call.inputs), outputs=(labels,), mixed=frozenset({axis}), addressing="elements"
    )


def gather_nd_links(call: OperatorCall) -> AxisLinks:
    """`GatherND`: the last axis of the indices addresses the axes of the data behind the batch axes."""
    data, indices, batch = rank_of(call, 0), rank_of(call, 1), call.integer("batch_dims", 0)
    depth = (call.fact(1).shape or (None,))[-1]
    depth = depth if isinstance(depth, int) else data - batch
    shared: Labels = tuple(range(batch))
    rest: Labels = tuple(range(batch + depth, data))
    places: Labels = tuple(f"index {place}" for place in range(batch, indices - 1))
    linked = ((*shared, *[None] * depth, *rest), (*shared, *places, None))
    return AxisLinks(inputs=linked, outputs=((*shared, *places, *rest),), addressing="nd")


def scatter_nd_links(call: OperatorCall) -> AxisLinks:
    """`ScatterND`: the last axis of the indices addresses the first axes of the data; the others are the updates'."""
    data, indices, updates = (rank_of(call, index) for index in range(3))
    rest: Labels = tuple(range(data - (updates - (indices - 1)), data))
    whole: Labels = (*[None] * (data - len(rest)), *rest)
    linked: tuple[Labels, ...] = (whole, (None,) * indices, (*[None] * (indices - 1), *rest))
    return AxisLinks(inputs=linked, outputs=(whole,), addressing="scatter_nd")


def resize_slice(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """`Slice`: an axis at another length is cut at other bounds."""
    bounds, source = slice_bounds(call), node.inputs[0]
    before, after = call.fact(0).shape, resizer.fact(node.outputs[0]).shape
    if bounds is None or source is None or before is None or after is None or len(node.inputs) < 3:
        return None
    starts, ends = dict(zip(bounds[0], bounds[1], strict=True)), dict(zip(bounds[0], bounds[2], strict=True))
    steps = dict(zip(bounds[0], bounds[3], strict=True))
    wanted, lengths = [], resizer.lengths
    cut = {axis.axis for axis in axes}
    if resizer.fixed and any(place not in cut and dim.is_less(start, 0) for place, start in starts.items()):
        return None  # the last places of the exported length
    for axis in axes:
        if axis.axis not in starts or (starts[axis.axis] == 0 and dim.is_equal(before[axis.axis], after[axis.axis])):
            wanted.append(axis)
            continue
        start = starts[axis.axis]
        is_end = not resizer.fixed and dim.is_equal(dim.add(start, after[axis.axis]), 0)  # a row for each token
        if steps[axis.axis] != 1 or not axis.is_plain or not dim.is_known(start):
            return None
        if dim.is_less(start, 0) and not is_end:
            return None
        if is_end and axis.variable.resolved() is not Length.NEW:
            cut.remove(axis.axis)  # a table that is too short gives too few, as in the export
            continue
        if is_end:
            start = dim.add(start, before[axis.axis])  # from the front, as an end of 0 would not be the last
        start = lengths.at(start, Length.TOTAL)
        first, last = lengths.span(axis.variable.resolved() or Length.TOTAL)
        starts[axis.axis], ends[axis.axis] = dim.add(start, first), dim.add(start, last)
    whole = {axis.axis for axis in wanted}
    made = [resizer.slice_of(source, tuple(wanted))]
    for numbers, to_the_end, index in ((starts, 0, 1), (ends, TO_THE_END, 2)):
        at = [
            to_the_end
            if place in whole
            else numbers[place]
            if place in cut
            else lengths.at(numbers[place], Length.TOTAL)
            for place in bounds[0]
        ]
        made.append(lengths.typed(lengths.vector(at), call.fact(index).dtype))
    return resizer.rebuilt(node, [*made, *node.inputs[3:]])


_SELECT = (Trait.REARRANGE, Trait.SELECT)

OPERATORS: list[Operator] = [
    *entries("Slice", slice_, slice_links, *_SELECT, Trait.PARAMETERIZED, resize=resize_slice),
    *entries("Gather", gather, gather_links, *_SELECT, Trait.LOOKUP),
    *entries("GatherBlockQuantized", gather_block_quantized, gather_links, Trait.LOOKUP),
    *entries("GatherElements", gather_elements, gather_elements_links, Trait.LOOKUP),
    *entries("GatherND", gather_nd, gather_nd_links, Trait.REARRANGE, Trait.LOOKUP),
    *entries("ScatterElements", scatter, gather_elements_links, Trait.MOVE, Trait.SCATTER),
    *entries("ScatterND", scatter, scatter_nd_links, Trait.MOVE, Trait.SCATTER),
    *entries("TensorScatter", scatter, None, Trait.SCATTER),
    *entries("Scatter", scatter),
]
