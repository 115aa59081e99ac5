"""Operators along an axis: reductions, normalisations, sorting, running sums."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import WIDEST_VALUE, Fact, OperatorCall, axis_of


def reduced_axes(call: OperatorCall) -> tuple[int, ...] | None:
    """Return the axes that a `Reduce...` goes over; None where they are not known."""
    rank = call.fact(0).rank
    axes = call.integers("axes", 1)
    if rank is None or (axes is None and call.given(1) is not None):
        return None
    if not axes:
        return () if call.integer("noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted(axis_of(int(axis), rank) for axis in axes))


def reduce(call: OperatorCall) -> Fact:
    """`Reduce...`: named axes are gone, or of size 1."""
    operand, axes = call.fact(0), reduced_axes(call)
    if operand.shape is None or axes is None:
        return Fact(None, operand.dtype)
    keep = call.integer("keepdims", 1)
    sizes: list[Dimension] = []
    for axis, size in enumerate(operand.shape):
        if axis not in axes:
            sizes.append(size)
        elif keep:
            sizes.append(1)
    return Fact(tuple(sizes), operand.dtype, _reduced_numbers(call, operand, axes, bool(keep)))


def _reduced_numbers(call: OperatorCall, operand: Fact, axes: tuple[int, ...], keep: bool) -> np.ndarray | None:
    folds = {"ReduceProd": dim.multiply, "ReduceSum": dim.add, "ReduceMax": dim.maximum, "ReduceMin": dim.minimum}
    fold = folds.get(call.node.op_type)
    if fold is None or operand.value is None or axes != tuple(range(operand.value.ndim)) or operand.value.size == 0:
        return None
    if any(isinstance(number, (float, bool)) for number in operand.value.reshape(-1)):
        return None
    result = operand.value.reshape(-1)[0]
    for number in operand.value.reshape(-1)[1:]:
        result = fold(result, number)
    return np.array(result, dtype=object).reshape((1,) * operand.value.ndim if keep else ())


def arg_extreme(call: OperatorCall) -> Fact:
    """`ArgMax`, `ArgMin`: where the extreme stands along one axis."""
    operand = call.fact(0)
    if operand.shape is None:
        return Fact(None, ir.DataType.INT64)
    axis = axis_of(call.integer("axis", 0), len(operand.shape))
    middle: tuple[Dimension, ...] = (1,) if call.integer("keepdims", 1) else ()
    return Fact(operand.shape[:axis] + middle + operand.shape[axis + 1 :], ir.DataType.INT64)


def top_k(call: OperatorCall) -> list[Fact]:
    """`TopK`: the k largest along one axis, and where they stand."""
    operand, count = call.fact(0), call.integers("k", 1)
    if operand.shape is None:
        return [Fact(None, operand.dtype), Fact(None, ir.DataType.INT64)]
    axis = axis_of(call.integer("axis", -1), len(operand.shape))
    extent = call.lost() if count is None else count[0]
    sizes = (*operand.shape[:axis], extent, *operand.shape[axis + 1 :])
    return [Fact(sizes, operand.dtype), Fact(sizes, ir.DataType.INT64)]


def cumulative_sum(call: OperatorCall) -> Fact:
    """`CumSum`: the shape is kept."""
    operand = call.fact(0)
    value = None
    concrete = operand.value is not None and all(isinstance(number, int) for number in operand.value.reshape(-1))
    plain = not call.integer("exclusive", 0) and not call.integer("reverse", 0)
    axis = call.numbers(1)
    if operand.value is not None and concrete and plain and axis and operand.value.size <= WIDEST_VALUE:
        value = np.cumsum(operand.value, axis=int(axis[0]))
    return Fact(operand.shape, operand.dtype, value)


def normalized(call: OperatorCall) -> list[Fact]:
    """`LayerNormalization` and its kin: the input's shape; statistics and residual sums behind it."""
    operand = call.fact(0)
    outputs = [Fact(operand.shape, operand.dtype)] * len(call.node.outputs)
    if call.node.op_type.startswith("Skip") or len(outputs) == 1 or operand.shape is None:
        return outputs
    axis = axis_of(call.integer("axis", -1), len(operand.shape))
    statistics = Fact((*operand.shape[:axis], *([1] * (len(operand.shape) - axis))), ir.DataType.FLOAT)
    return [outputs[0], *([statistics] * (len(outputs) - 1))]
