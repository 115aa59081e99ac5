"""`Slice`: its bounds counted from the front, in whole numbers or in lengths."""

from __future__ import annotations

from kvsurgeon.ops.layout import whole_numbers
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall, axis_of

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
            sizes[axis] = call.lost()
        return Fact(tuple(sizes), operand.dtype)
    picks: list[slice] = [slice(None)] * len(sizes)
    concrete = True
    for axis, start, end, step in zip(*bounds, strict=True):
        if step < 0:
            sizes[axis] = sizes[axis] if step == -1 and _is_whole_reversal(start, end) else call.lost()
            picks[axis] = slice(None, None, step)
            concrete = concrete and step == -1
            continue
        first, last = _clamped(call, start, sizes[axis]), _clamped(call, end, sizes[axis])
        extent = dim.subtract(last, first)
        if step > 1:
            extent = dim.floor_quotient(dim.add(extent, step - 1), step)
        sizes[axis] = max(extent, 0) if isinstance(extent, int) else extent
        if isinstance(first, int) and isinstance(last, int):
            picks[axis] = slice(first, last, step)
        else:
            concrete = False
    value = operand.value[tuple(picks)] if operand.value is not None and concrete else None
    return Fact(tuple(sizes), operand.dtype, value)


def _is_whole_reversal(start: Dimension, end: Dimension) -> bool:
    return start == -1 and isinstance(end, int) and end <= -FAR
