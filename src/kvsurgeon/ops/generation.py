"""Operators that make tensors out of shapes and lengths."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import WIDEST_VALUE, Fact, OperatorCall, axis_of, known

INT64 = ir.DataType.INT64


def shape(call: OperatorCall) -> Fact:
    """`Shape`: the dimensions as numbers, from `start` to `end`."""
    sizes = call.fact(0).shape
    if sizes is None:
        return Fact((call.lost("rank"),), INT64)
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
        return Fact(None if rank is None else tuple(call.lost() for _ in range(rank)), dtype)
    value = None
    if all(isinstance(extent, int) for extent in target):
        extents = [int(extent) for extent in target]
        if np.prod(extents, dtype=int) <= WIDEST_VALUE:
            value = np.full(extents, number, dtype=object)
    return Fact(tuple(target), dtype, value)


def range_(call: OperatorCall) -> Fact:
    """`Range`: as many numbers as fit between start and limit."""
    dtype = call.fact(0).dtype
    ends = [call.numbers(index) for index in range(3)]
    if any(end is None for end in ends):
        return Fact((call.lost(),), dtype)
    start, limit, delta = (end[0] for end in ends if end is not None)
    if all(isinstance(number, (int, float)) for number in (start, limit, delta)):
        count = int(np.ceil((limit - start) / delta)) if delta else 0
        if count <= WIDEST_VALUE:
            return known(np.array([start + delta * i for i in range(max(count, 0))], dtype=object), dtype)
        return Fact((count,), dtype)
    extent = dim.subtract(limit, start)
    if delta == -1:
        extent = dim.multiply(-1, extent)
    elif delta != 1:
        extent = dim.floor_quotient(dim.add(extent, dim.subtract(delta, 1)), delta)
    return Fact((extent,), dtype)


def one_hot(call: OperatorCall) -> Fact:
    """`OneHot`: a new axis as deep as `depth`."""
    indices, depth = call.fact(0), call.numbers(1)
    if indices.shape is None:
        return Fact(None, call.fact(2).dtype)
    axis = axis_of(call.integer("axis", -1), len(indices.shape) + 1)
    extent: Dimension = call.lost() if depth is None else _whole(depth[0])
    shape = (*indices.shape[:axis], extent, *indices.shape[axis:])
    return Fact(shape, call.fact(2).dtype, _one_hot_numbers(call, axis, extent))


def _one_hot_numbers(call: OperatorCall, axis: int, extent: Dimension) -> np.ndarray | None:
    """The numbers themselves: exporters spell `repeat_interleave` of a shape this way."""
    hot, off_on = call.fact(0).value, call.fact(2).value
    if hot is None or off_on is None or not isinstance(extent, int) or hot.size * extent > WIDEST_VALUE:
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
    return Fact((call.lost("rank") if rank is None else rank, call.lost("count")), INT64)


def random_like(call: OperatorCall) -> Fact:
    """`RandomNormalLike` and its kin: the input's shape."""
    return Fact(call.fact(0).shape, call.fact(0).dtype)
