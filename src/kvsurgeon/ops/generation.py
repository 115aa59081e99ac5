"""Operators that make tensors out of shapes and lengths."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from kvsurgeon.ops.operator import AxisLinks, Operator, Trait, entries, identity_links, parameters
from kvsurgeon.ops.resizing import WHOLE_NUMBERS, Resizer
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import NEW, Dimension
from kvsurgeon.symbolic.fact import WIDEST_VALUE, Fact, OperatorCall, axis_of, known
from kvsurgeon.symbolic.sequence_axes import Axes, Length

INT64 = ir.DataType.INT64


def shape(call: OperatorCall) -> Fact:
    """`Shape`: the dimensions as numbers, from `start` to `end`."""
    sizes = call.fact(0).shape
    if sizes is None:
        return Fact((call.unknown("rank"),), INT64)
    end = call.attribute("end")
    return known(np.array(sizes, dtype=object)[call.integer("start", 0) : end], INT64)


def size(call: OperatorCall) -> Fact:
    """`Size`: the number of elements."""
    sizes = call.fact(0).shape
    return Fact((), INT64) if sizes is None else known(np.array(dim.product(sizes), dtype=object), INT64)


def constant_of_shape(call: OperatorCall) -> Fact:
    """`ConstantOfShape`: one number everywhere."""
    target = call.numbers(0)
    filler = call.attribute("value")
    dtype = ir.DataType.FLOAT if filler is None else filler.dtype
    number = 0.0 if filler is None else filler.numpy().reshape(-1)[0].item()
    if target is None:
        length = call.fact(0).shape
        rank = length[0] if length and isinstance(length[0], int) else None
        return Fact(None if rank is None else tuple(call.unknown() for _ in range(rank)), dtype)
    value = None
    if all(isinstance(extent, int) for extent in target):
        extents = [int(extent) for extent in target]
        if call.is_small(extents):
            value = np.full(extents, number, dtype=object)
    return Fact(tuple(target), dtype, value)


def range_(call: OperatorCall) -> Fact:
    """`Range`: as many numbers as fit between start and limit."""
    dtype = call.fact(0).dtype
    ends = [call.numbers(index) for index in range(3)]
    if any(end is None for end in ends):
        return Fact((call.unknown(),), dtype)
    start, limit, delta = (end[0] for end in ends if end is not None)
    if all(isinstance(number, (int, float)) for number in (start, limit, delta)):
        whole = all(isinstance(number, int) for number in (start, limit, delta))
        count = 0 if not delta else -((start - limit) // delta) if whole else math.ceil((limit - start) / delta)
        if count <= WIDEST_VALUE:
            return known(np.array([start + delta * i for i in range(max(count, 0))], dtype=object), dtype)
        return Fact((count,), dtype)
    step = int(delta) if isinstance(delta, float) and delta.is_integer() else delta
    extent = dim.subtract(limit, start)
    if not isinstance(step, int) or step == 0 or not _is_whole(extent):
        return Fact((call.unknown(),), dtype)
    extent = dim.multiply(-1 if step < 0 else 1, extent)
    return Fact((dim.floor_quotient(dim.at_least_zero(dim.add(extent, abs(step) - 1)), abs(step)),), dtype)


def _is_whole(number: Dimension) -> bool:
    return isinstance(number, int) or bool(number.is_integer)


def one_hot(call: OperatorCall) -> Fact:
    """`OneHot`: a new axis as deep as `depth`."""
    indices, depth = call.fact(0), call.numbers(1)
    if indices.shape is None:
        return Fact(None, call.fact(2).dtype)
    axis = axis_of(call.integer("axis", -1), len(indices.shape) + 1)
    extent: Dimension = call.unknown() if depth is None else _whole(depth[0])
    shape = (*indices.shape[:axis], extent, *indices.shape[axis:])
    return Fact(shape, call.fact(2).dtype, _one_hot_numbers(call, axis, extent))


def _one_hot_numbers(call: OperatorCall, axis: int, extent: Dimension) -> np.ndarray | None:
    """The numbers themselves: exporters spell `repeat_interleave` of a shape this way."""
    hot, off_on = call.fact(0).value, call.fact(2).value
    if hot is None or off_on is None or not isinstance(extent, int) or not call.is_small([hot.size, extent]):
        return None
    if not all(isinstance(index, int) for index in hot.reshape(-1)):
        return None
    chosen = np.expand_dims(hot.astype(np.int64) % extent, axis)
    places = np.arange(extent).reshape([-1 if place == axis else 1 for place in range(hot.ndim + 1)])
    off, on = off_on.reshape(-1)
    numbers: np.ndarray = np.where(chosen == places, on, off)
    return numbers


def _whole(number: Dimension | float) -> Dimension:
    return int(number) if isinstance(number, float) else number


def eye_like(call: OperatorCall) -> Fact:
    """`EyeLike`: a matrix of the input's shape."""
    declared = call.attribute("dtype")
    return Fact(call.fact(0).shape, call.fact(0).dtype if declared is None else ir.DataType(declared))


def non_zero(call: OperatorCall) -> Fact:
    """`NonZero`: a column for each place that is not zero, as many as the data says."""
    rank = call.fact(0).rank
    return Fact((call.unknown("rank") if rank is None else rank, call.unknown("count")), INT64)


def one_hot_links(call: OperatorCall) -> AxisLinks:
    """`OneHot`: a new axis among those of the indices."""
    labels = identity_links(call)
    axis = axis_of(call.integer("axis", -1), len(labels) + 1)
    return AxisLinks(inputs=parameters(call, labels), outputs=((*labels[:axis], None, *labels[axis:]),))


def resize_constant_of_shape(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """`ConstantOfShape`: the shape at the lengths of the axes."""
    after = resizer.fact(node.outputs[0]).shape
    if after is None or not dim.all_known(after):
        return None
    return resizer.rebuilt(node, [resizer.lengths.vector(resizer.sizes(after, axes))])


def resize_range(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """`Range`: `Range(0, T)[P:T]` is `Range(P, T)`."""
    start, delta = call.numbers(0), call.numbers(2)
    ends = None if start is None or delta != (1,) else range_ends(resizer, call.result, start[0], axes)
    return None if ends is None else resizer.rebuilt(node, [*ends, node.inputs[2]])


def range_ends(resizer: Resizer, fact: Fact, start: Dimension, axes: Axes) -> list[ir.Value] | None:
    """Return start and limit of whole numbers that count up from a start, at the length of an axis; None if unknown."""
    lengths = resizer.lengths
    if fact.shape is None or fact.dtype not in WHOLE_NUMBERS:
        return None
    first, extent = lengths.at(start, Length.TOTAL), lengths.at(fact.shape[0], Length.TOTAL)
    if axes and resizer.fixed:
        extent = lengths.total
    if not dim.is_known(extent) or not dim.is_known(first):
        return None
    if axes and axes[0].variable.resolved() is Length.NEW:
        if axes[0].outer != 1 or axes[0].learned_rows or axes[0].most is not None:
            return None
        inner = lengths.at(axes[0].inner, Length.TOTAL)
        first, extent = dim.add(first, dim.multiply(lengths.past, inner)), dim.multiply(NEW, inner)
    return [lengths.typed(lengths.scalar(end), fact.dtype) for end in (first, dim.add(first, extent))]


def resize_eye_like(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """`EyeLike`: rows and columns are compared, as the diagonal of a slice may begin anywhere."""
    fact, lengths = resizer.fact(node.outputs[0]), resizer.lengths
    if fact.shape is None or fact.dtype is None or not dim.all_known(fact.shape) or not all(a.is_plain for a in axes):
        return None
    starts: list[Dimension] = [call.integer("k", 0), 0]
    for axis in axes:
        if axis.variable.resolved() is Length.NEW:
            starts[axis.axis] = dim.add(starts[axis.axis], lengths.past)
    places = []
    for start, size in zip(starts, resizer.sizes(fact.shape, axes), strict=True):
        ends = [lengths.scalar(number) for number in (start, dim.add(start, size), 1)]
        places.append(resizer.editor.node("Range", ends, name="places", dtype=INT64))
    column = resizer.editor.node("Reshape", [places[0], lengths.vector([-1, 1])], name="rows", dtype=INT64)
    same = resizer.editor.node("Equal", [column, places[1]], name="diagonal", dtype=ir.DataType.BOOL)
    name = f"{node.outputs[0].name}.eye"
    return resizer.editor.node("Cast", [same], {"to": int(fact.dtype)}, name=name, dtype=fact.dtype)


OPERATORS: list[Operator] = [
    *entries("Shape", shape, None, Trait.SHAPE_ONLY),
    *entries("Size", size, None, Trait.SHAPE_ONLY),
    *entries("ConstantOfShape", constant_of_shape, None, Trait.SHAPE_ONLY,
             extent_inputs=frozenset({0}), resize=resize_constant_of_shape),
    *entries("EyeLike", eye_like, None, Trait.SHAPE_ONLY, resize=resize_eye_like),
    *entries("Range", range_, None, Trait.MOVE, extent_inputs=frozenset({1}), resize=resize_range),
    *entries("OneHot", one_hot, one_hot_links),
    *entries("NonZero", non_zero, None, Trait.ROUTING),
]  # fmt: skip
