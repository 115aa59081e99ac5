"""Operators along an axis: reductions, normalizations, sorting, running sums."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.query import is_operator
from kvsurgeon.ops.elementwise import same_as_first
from kvsurgeon.ops.generation import range_ends
from kvsurgeon.ops.operator import (
    AxisLinks,
    Operator,
    Trait,
    UntraceableAxesError,
    along,
    broadcast_links,
    entries,
    identity_links,
    parameters,
    rank_of,
)
from kvsurgeon.ops.resizing import Resizer
from kvsurgeon.ops.schema import by_schema
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import WIDEST_VALUE, Fact, OperatorCall, axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable


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
    """`ArgMax`, `ArgMin`: the index of the extreme along one axis."""
    operand = call.fact(0)
    if operand.shape is None:
        return Fact(None, ir.DataType.INT64)
    axis = axis_of(call.integer("axis", 0), len(operand.shape))
    middle: tuple[Dimension, ...] = (1,) if call.integer("keepdims", 1) else ()
    return Fact(operand.shape[:axis] + middle + operand.shape[axis + 1 :], ir.DataType.INT64)


def top_k(call: OperatorCall) -> list[Fact]:
    """`TopK`: the k largest along one axis, and their indices."""
    operand, count = call.fact(0), call.integers("k", 1)
    if operand.shape is None:
        return [Fact(None, operand.dtype), Fact(None, ir.DataType.INT64)]
    axis = axis_of(call.integer("axis", -1), len(operand.shape))
    extent = call.unknown() if count is None else count[0]
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


def softmax_links(call: OperatorCall) -> AxisLinks:
    """`Softmax` and its kind: mixed along one axis, before opset 13 along all from it on."""
    rank = rank_of(call, 0)
    old = call.integer("opset", call.opset) < 13  # a quantized one states its opset
    axis = axis_of(call.integer("axis", 1 if old else -1), rank)
    return along(call, *(range(axis, rank) if old else (axis,)))


def normalization_links(call: OperatorCall) -> AxisLinks:
    """`LayerNormalization` and its kind: mixed along all axes from `axis` on; further inputs are broadcast."""
    rank = rank_of(call, 0)
    return broadcast_links(call, mixed=frozenset(range(axis_of(call.integer("axis", -1), rank), rank)))


def lp_normalization_links(call: OperatorCall) -> AxisLinks:
    """`LpNormalization`: mixed along one axis."""
    return along(call, call.integer("axis", -1))


def channel_normalization_links(call: OperatorCall) -> AxisLinks:
    """`InstanceNormalization`, `GroupNormalization`: mixed along all axes behind the batch, channels grouped or not."""
    labels, grouped = identity_links(call), call.node.op_type == "GroupNormalization"
    mixed = frozenset(range(1 if grouped else 2, len(labels)))
    return AxisLinks(inputs=(labels, *[(1,)] * (len(call.inputs) - 1)), outputs=(labels,), mixed=mixed)


def reduce_links(call: OperatorCall) -> AxisLinks:
    """`Reduce...`: mixed along the axes that are reduced."""
    axes = reduced_axes(call)
    if axes is None:
        raise UntraceableAxesError("the reduced axes are unknown")
    return _reduced(call, axes, keep=bool(call.integer("keepdims", 1)))


def arg_extreme_links(call: OperatorCall) -> AxisLinks:
    """`ArgMax`, `ArgMin`: mixed along one axis."""
    axis = axis_of(call.integer("axis", 0), rank_of(call, 0))
    return _reduced(call, (axis,), keep=bool(call.integer("keepdims", 1)))


def global_pool_links(call: OperatorCall) -> AxisLinks:
    """`GlobalAveragePool` and its kind: mixed along all axes behind the channels."""
    return _reduced(call, tuple(range(2, rank_of(call, 0))), keep=True)


def _reduced(call: OperatorCall, axes: tuple[int, ...], *, keep: bool) -> AxisLinks:
    labels = identity_links(call)
    result = tuple(None if label in axes else label for label in labels if keep or label not in axes)
    return AxisLinks(inputs=parameters(call, labels), outputs=(result,), mixed=frozenset(axes))


def top_k_links(call: OperatorCall) -> AxisLinks:
    """`TopK`: mixed along one axis, which keeps its label if all elements are sorted, or as many as there are."""
    labels = identity_links(call)
    axis = axis_of(call.integer("axis", -1), len(labels))
    before, after = call.fact(0).shape, call.result.shape
    whole = before is not None and after is not None and dim.is_equal(before[axis], after[axis])
    most = None if before is None or after is None else dim.bound_below(after[axis], before[axis])
    is_kept = whole or most is not None
    result = labels if is_kept else tuple(None if label == axis else label for label in labels)
    return AxisLinks(
        inputs=parameters(call, labels), outputs=(result,) * len(call.node.outputs), mixed=frozenset({axis}),
        length_inputs=[(1, axis)] if is_kept else [], ranked={} if most is None else {axis: most},
    )  # fmt: skip


def cumulative_links(call: OperatorCall) -> AxisLinks:
    """`CumSum`, `CumProd`: mixed along one axis, with the elements before or with those after."""
    axis = call.numbers(1)
    if axis is None or not isinstance(axis[0], int):
        raise UntraceableAxesError("the axis that it accumulates along is unknown")
    nearest = call.integer("exclusive", 0)
    window = (nearest, math.inf) if call.integer("reverse", 0) else (-math.inf, -nearest)
    return along(call, axis[0], windows={axis_of(axis[0], rank_of(call, 0)): window})


def resize_cumulative_sum(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """`CumSum`: ones are counted; others are accumulated over the total length, then sliced."""
    along_axis, rank, source = call.numbers(1), call.fact(0).rank, node.inputs[0]
    if along_axis is None or rank is None or source is None or not isinstance(along_axis[0], int):
        return None
    if rank == 1 and not call.integer("reverse", 0) and _are_ones(resizer, source):
        return _counted(resizer, node, call, axes)
    place = axis_of(along_axis[0], rank)
    total = LengthVariable(Length.TOTAL)
    inside = tuple(axis.with_variable(total) if axis.axis == place else axis for axis in axes)
    whole = resizer.rebuilt(node, [resizer.slice_of(source, inside), node.inputs[1]])
    new = tuple(axis for axis in axes if axis.axis == place and axis.variable.resolved() is Length.NEW)
    return resizer.sliced(whole, new)


def _are_ones(resizer: Resizer, value: ir.Value) -> bool:
    """Return whether all elements are 1, by the node that fills the tensor."""
    node = value.producer()
    if node is None or not is_operator(node, "Expand", "ConstantOfShape"):
        return False
    filler, source = node.attributes.get("value"), node.inputs[0]
    if node.op_type == "ConstantOfShape":
        return filler is not None and filler.as_tensor().numpy().item() == 1
    numbers = None if source is None else resizer.fact(source).value
    return numbers is not None and bool((numbers == 1).all())


def _counted(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """Return the sums of ones from the first: numbers that count up."""
    ends = range_ends(resizer, call.result, 1 - call.integer("exclusive", 0), axes)
    if ends is None:
        return None
    dtype, name = call.result.dtype, f"{node.outputs[0].name}.count"
    step = resizer.lengths.typed(resizer.lengths.scalar(1), dtype)
    return resizer.editor.node("Range", [*ends, step], name=name, dtype=dtype)


OPERATORS: list[Operator] = [
    *entries("Softmax", same_as_first, softmax_links, Trait.SOFTMAX),
    *entries("LogSoftmax Hardmax QLinearSoftmax", same_as_first, softmax_links),
    *entries("LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization "
             "SkipSimplifiedLayerNormalization", normalized, normalization_links, Trait.NORMALIZATION),
    *entries("GatedRMSNorm BranchwiseRMSNorm", same_as_first, normalization_links),
    *entries("LpNormalization", same_as_first, lp_normalization_links),
    *entries("InstanceNormalization GroupNormalization", same_as_first, channel_normalization_links,
             Trait.NORMALIZATION),
    *entries("MeanVarianceNormalization", same_as_first),
    *entries("ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceProd ReduceSumSquare",
             reduce, reduce_links, Trait.REDUCTION, Trait.PARAMETERIZED),
    *entries("ReduceSum", reduce, reduce_links, Trait.REDUCTION, Trait.PARAMETERIZED, Trait.ANALYTIC),
    *entries("ReduceMax ReduceMean ReduceMin", reduce, reduce_links, Trait.REDUCTION, Trait.PARAMETERIZED,
             Trait.EXTREMUM_OR_MEAN),
    *entries("ArgMax ArgMin", arg_extreme, arg_extreme_links),
    *entries("GlobalAveragePool GlobalMaxPool", by_schema, global_pool_links),
    *entries("TopK", top_k, top_k_links, Trait.PARAMETERIZED),
    *entries("CumSum", cumulative_sum, cumulative_links, Trait.ANALYTIC, resize=resize_cumulative_sum),
    *entries("CumProd", same_as_first, cumulative_links),
]  # fmt: skip
