"""Operators that move elements without computing: reshaping, picking, joining."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import WIDEST_VALUE, Fact, OperatorCall, axis_of


def whole_numbers(numbers: Iterable[Dimension] | None) -> list[int] | None:
    """Return the numbers as integers; None where one of them depends on a length, or none is known."""
    listed = None if numbers is None else list(numbers)
    if listed is None or not all(isinstance(number, (int, np.integer)) for number in listed):
        return None
    return [int(number) for number in listed]


def reshape(call: OperatorCall) -> Fact:
    """`Reshape`: 0 keeps the input's dimension, -1 takes what is left over."""
    operand, target = call.fact(0), call.numbers(1)
    if target is None and call.integers("shape") is not None:  # opset 1
        target = call.integers("shape")
    if target is None:
        length = call.fact(1).shape
        rank = length[0] if length and isinstance(length[0], int) else None
        shape = None if rank is None else tuple(call.lost() for _ in range(rank))
        return Fact(shape, operand.dtype)
    sizes = list(target)
    if not call.integer("allowzero", 0):
        for axis, size in enumerate(sizes):
            if size == 0:
                sizes[axis] = operand.shape[axis] if operand.shape is not None else call.lost()
    if any(size == -1 for size in sizes):
        _infer_rest(call, operand, sizes)
    shape = tuple(sizes)
    value = None
    if operand.value is not None and (concrete := whole_numbers(shape)) is not None:
        value = operand.value.reshape(concrete)
    return Fact(shape, operand.dtype, value)


def _infer_rest(call: OperatorCall, operand: Fact, sizes: list[Dimension]) -> None:
    place = next(axis for axis, size in enumerate(sizes) if size == -1)
    others = dim.product(size for axis, size in enumerate(sizes) if axis != place)
    rest = None if operand.shape is None else dim.exact_quotient(dim.product(operand.shape), others)
    sizes[place] = call.lost() if rest is None else rest


def flatten(call: OperatorCall) -> Fact:
    """`Flatten`: two axes, cut at `axis`."""
    operand = call.fact(0)
    if operand.shape is None:
        return Fact((call.lost(), call.lost()), operand.dtype)
    axis = call.integer("axis", 1)
    axis = axis_of(axis, len(operand.shape))
    return Fact((dim.product(operand.shape[:axis]), dim.product(operand.shape[axis:])), operand.dtype)


def transpose(call: OperatorCall) -> Fact:
    """`Transpose`: axes in the order of `perm`, reversed without one."""
    operand = call.fact(0)
    if operand.shape is None:
        return Fact(None, operand.dtype)
    order = call.attribute("perm") or tuple(reversed(range(len(operand.shape))))
    value = None if operand.value is None else operand.value.transpose(order)
    return Fact(tuple(operand.shape[axis] for axis in order), operand.dtype, value)


def unsqueeze(call: OperatorCall) -> Fact:
    """`Unsqueeze`: axes of size 1 where `axes` says, counted in the result."""
    operand, axes = call.fact(0), whole_numbers(call.integers("axes", 1))
    if operand.shape is None or axes is None:
        return Fact(None, operand.dtype)
    rank = len(operand.shape) + len(axes)
    new = {axis_of(axis, rank) for axis in axes}
    old = iter(operand.shape)
    shape = tuple(1 if axis in new else next(old) for axis in range(rank))
    value = None if operand.value is None else np.expand_dims(operand.value, tuple(sorted(new)))
    return Fact(shape, operand.dtype, value)


def squeeze(call: OperatorCall) -> Fact:
    """`Squeeze`: axes of size 1 are gone."""
    operand, axes = call.fact(0), whole_numbers(call.integers("axes", 1))
    if operand.shape is None or (axes is None and call.given(1) is not None):
        return Fact(None, operand.dtype)
    rank = len(operand.shape)
    if axes is None:
        gone = {axis for axis, size in enumerate(operand.shape) if size == 1}
    else:
        gone = {axis_of(axis, rank) for axis in axes}
    shape = tuple(size for axis, size in enumerate(operand.shape) if axis not in gone)
    value = None
    if operand.value is not None:
        value = operand.value.reshape([size for axis, size in enumerate(operand.value.shape) if axis not in gone])
    return Fact(shape, operand.dtype, value)


def expand(call: OperatorCall) -> Fact:
    """`Expand`: broadcast against a shape."""
    operand, target = call.fact(0), call.numbers(1)
    if operand.shape is None:
        return Fact(None, operand.dtype)
    if target is None:
        length = call.fact(1).shape
        if not length or not isinstance(length[0], int):
            return Fact(None, operand.dtype)
        target = tuple(call.lost() for _ in range(length[0]))
    rank = max(len(target), len(operand.shape))
    left = (1,) * (rank - len(operand.shape)) + operand.shape
    right = (1,) * (rank - len(target)) + tuple(target)
    shape = tuple(dim.broadcast(a, b) for a, b in zip(left, right, strict=True))
    value = None
    concrete = whole_numbers(shape)
    if operand.value is not None and concrete is not None and np.prod(concrete, dtype=int) <= WIDEST_VALUE:
        value = np.broadcast_to(operand.value, concrete)
    return Fact(shape, operand.dtype, value)


def tile(call: OperatorCall) -> Fact:
    """`Tile`: each axis so many times over."""
    operand, repeats = call.fact(0), call.numbers(1)
    if operand.shape is None or repeats is None:
        return Fact(None if operand.shape is None else tuple(call.lost() for _ in operand.shape), operand.dtype)
    shape = tuple(dim.multiply(size, times) for size, times in zip(operand.shape, repeats, strict=True))
    concrete = whole_numbers(repeats)
    value = np.tile(operand.value, concrete) if operand.value is not None and concrete is not None else None
    return Fact(shape, operand.dtype, value)


def joined_inputs(call: OperatorCall) -> range:
    """Indices of the tensors that a `Concat` joins; a quantised one has each with its scale and zero point."""
    return range(2, len(call.inputs), 3) if call.node.op_type == "QLinearConcat" else range(len(call.inputs))


def concat(call: OperatorCall) -> Fact:
    """`Concat`: joined along one axis."""
    operands = [operand for index in joined_inputs(call) if (operand := call.given(index)) is not None]
    shapes = [operand.shape for operand in operands]
    dtype = operands[0].dtype
    ranked = next((shape for shape in shapes if shape is not None), None)
    if ranked is None:
        return Fact(None, dtype)
    axis = axis_of(call.integer("axis", 0), len(ranked))
    sizes = list(ranked)
    for place in range(len(sizes)):
        known = [shape[place] for shape in shapes if shape is not None]
        sizes[place] = next((size for size in known if isinstance(size, int)), known[0])
    total: Dimension = 0
    for shape in shapes:
        total = dim.add(total, shape[axis] if shape is not None else call.lost())
    sizes[axis] = total
    value = None
    if all(operand.value is not None for operand in operands):
        value = np.concatenate([operand.value for operand in operands if operand.value is not None], axis=axis)
    return Fact(tuple(sizes), dtype, value)


def split(call: OperatorCall) -> list[Fact]:
    """`Split`: parts along one axis, equal ones where no sizes are given."""
    operand, count = call.fact(0), len(call.node.outputs)
    if operand.shape is None:
        return [Fact(None, operand.dtype)] * count
    axis = axis_of(call.integer("axis", 0), len(operand.shape))
    sizes = call.integers("split", 1)
    if sizes is None:
        sizes = _equal_parts(call, operand.shape[axis], count)
    bounds = [0, *itertools.accumulate(size if isinstance(size, int) else 0 for size in sizes)]
    parts = []
    for index, size in enumerate(sizes):
        shape = (*operand.shape[:axis], size, *operand.shape[axis + 1 :])
        value = None
        if operand.value is not None and isinstance(size, int):
            value = np.take(operand.value, range(bounds[index], bounds[index + 1]), axis=axis)
        parts.append(Fact(shape, operand.dtype, value))
    return parts


def _equal_parts(call: OperatorCall, size: Dimension, count: int) -> tuple[Dimension, ...]:
    if call.given(1) is not None:
        return tuple(call.lost() for _ in range(count))
    if isinstance(size, int):
        part = -(-size // count)
        return (*(part for _ in range(count - 1)), size - part * (count - 1))
    equal = dim.exact_quotient(size, count)
    return tuple(call.lost() if equal is None else equal for _ in range(count))


def _everywhere(table: Fact) -> Any:
    """The number that stands in every place of a table: whatever is picked, it is this; None where there is none."""
    numbers = [] if table.value is None else list(table.value.reshape(-1))
    return numbers[0] if len(numbers) > 1 and all(number == numbers[0] for number in numbers) else None


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
    elif (everywhere := _everywhere(table)) is not None and (sizes := whole_numbers(shape)) is not None:
        value = np.full(sizes, everywhere, dtype=object)
    return Fact(shape, table.dtype, value)


def gather_block_quantized(call: OperatorCall) -> Fact:
    """`GatherBlockQuantized` of com.microsoft: a `Gather`, dequantised, of numbers packed along one axis."""
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
    batch_axes = call.integer("batch_dims", 0)
    return Fact(indices.shape[:-1] + data.shape[batch_axes + indices.shape[-1] :], data.dtype)


def pad(call: OperatorCall) -> Fact:
    """`Pad`: each axis longer by what stands before and behind it."""
    operand, pads = call.fact(0), call.integers("pads", 1)
    if operand.shape is None:
        return Fact(None, operand.dtype)
    axes = whole_numbers(call.numbers(3)) if call.given(3) else list(range(len(operand.shape)))
    if pads is None or axes is None:
        return Fact(tuple(call.lost() for _ in operand.shape), operand.dtype)
    sizes = list(operand.shape)
    for place, axis in enumerate(axes):
        sizes[axis] = dim.add(sizes[axis], dim.add(pads[place], pads[place + len(axes)]))
    value = None
    if operand.value is not None and operand.value.ndim == 1 and (ends := whole_numbers(pads)) is not None:
        fill = call.fact(2).value
        constant = 0 if fill is None else fill.reshape(-1)[0]
        if min(ends) >= 0:
            value = np.concatenate(
                [np.full(ends[0], constant, object), operand.value, np.full(ends[1], constant, object)]
            )
    return Fact(tuple(sizes), operand.dtype, value)


def scatter(call: OperatorCall) -> Fact:
    """`ScatterND`, `ScatterElements`: the data with places overwritten."""
    data, indices, updates = call.fact(0), call.fact(1), call.fact(2)
    value = None
    if (
        call.node.op_type == "ScatterND"
        and data.value is not None
        and updates.value is not None
        and indices.value is not None
        and whole_numbers(indices.value.reshape(-1)) is not None
    ):
        value = data.value.copy()
        for place in np.ndindex(indices.value.shape[:-1]):
            value[tuple(int(index) for index in indices.value[place])] = updates.value[place]
    return Fact(data.shape, data.dtype, value)
