"""Operators that move elements without computing: reshape, transpose, repeat, concatenate, pad."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from kvsurgeon.ops.elementwise import unary
from kvsurgeon.ops.operator import (
    AxisLinks,
    Label,
    Operator,
    Trait,
    UntraceableAxesError,
    entries,
    identity_links,
    kept,
    parameters,
    rank_of,
)
from kvsurgeon.ops.resizing import Resizer
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall, axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length


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
        shape = None if rank is None else tuple(call.unknown() for _ in range(rank))
        return Fact(shape, operand.dtype)
    sizes = list(target)
    if not call.integer("allowzero", 0):
        for axis, size in enumerate(sizes):
            if size == 0:
                sizes[axis] = operand.shape[axis] if operand.shape is not None else call.unknown()
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
    sizes[place] = call.unknown() if rest is None else rest


def flatten(call: OperatorCall) -> Fact:
    """`Flatten`: two axes, cut at `axis`."""
    operand = call.fact(0)
    if operand.shape is None:
        return Fact((call.unknown(), call.unknown()), operand.dtype)
    axis, rank = call.integer("axis", 1), len(operand.shape)
    axis = rank if axis == rank else axis_of(axis, rank)
    shape = (dim.product(operand.shape[:axis]), dim.product(operand.shape[axis:]))
    concrete = None if operand.value is None else whole_numbers(shape)
    value = None if operand.value is None or concrete is None else operand.value.reshape(concrete)
    return Fact(shape, operand.dtype, value)


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
        target = tuple(call.unknown() for _ in range(length[0]))
    rank = max(len(target), len(operand.shape))
    left = (1,) * (rank - len(operand.shape)) + operand.shape
    right = (1,) * (rank - len(target)) + tuple(target)
    shape = tuple(dim.broadcast(a, b) for a, b in zip(left, right, strict=True))
    value = None
    concrete = whole_numbers(shape)
    if operand.value is not None and concrete is not None and call.is_small(concrete):
        value = np.broadcast_to(operand.value, concrete)
    return Fact(shape, operand.dtype, value)


def tile(call: OperatorCall) -> Fact:
    """`Tile`: each axis so many times over."""
    operand, repeats = call.fact(0), call.numbers(1)
    if operand.shape is None or repeats is None:
        return Fact(None if operand.shape is None else tuple(call.unknown() for _ in operand.shape), operand.dtype)
    shape = tuple(dim.multiply(size, times) for size, times in zip(operand.shape, repeats, strict=True))
    concrete, value = whole_numbers(shape), None
    if operand.value is not None and concrete is not None and call.is_small(concrete):
        value = np.tile(operand.value, whole_numbers(repeats) or ())
    return Fact(shape, operand.dtype, value)


def joined_inputs(call: OperatorCall) -> range:
    """Indices of the tensors that a `Concat` joins; a quantized one has each with its scale and zero point."""
    return range(2, len(call.inputs), 3) if call.node.op_type == "QLinearConcat" else range(len(call.inputs))


def concat(call: OperatorCall) -> Fact:
    """`Concat`: joined along one axis."""
    operands = [operand for index in joined_inputs(call) if (operand := call.given(index)) is not None]
    shapes = [operand.shape for operand in operands]
    dtype = operands[0].dtype
    ranked = next((shape for shape in shapes if shape is not None), None)
    if ranked is None:
        return Fact(None, dtype)
    if any(shape is not None and len(shape) != len(ranked) for shape in shapes):
        raise ValueError("tensors of different ranks")
    axis = axis_of(call.integer("axis", 0), len(ranked))
    sizes = list(ranked)
    for place in range(len(sizes)):
        known = [shape[place] for shape in shapes if shape is not None]
        sizes[place] = next((size for size in known if isinstance(size, int)), known[0])
    total: Dimension = 0
    for shape in shapes:
        total = dim.add(total, shape[axis] if shape is not None else call.unknown())
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
        if operand.value is not None and isinstance(size, int) and call.is_small([size]):
            value = np.take(operand.value, range(bounds[index], bounds[index + 1]), axis=axis)
        parts.append(Fact(shape, operand.dtype, value))
    return parts


def _equal_parts(call: OperatorCall, size: Dimension, count: int) -> tuple[Dimension, ...]:
    if call.given(1) is not None:
        return tuple(call.unknown() for _ in range(count))
    if isinstance(size, int):
        part = -(-size // count)
        return (*(part for _ in range(count - 1)), size - part * (count - 1))
    equal = dim.exact_quotient(size, count)
    return tuple(call.unknown() if equal is None else equal for _ in range(count))


def pad(call: OperatorCall) -> Fact:
    """`Pad`: each axis longer by the pads before and after it."""
    operand, pads = call.fact(0), call.integers("pads", 1)
    if operand.shape is None:
        return Fact(None, operand.dtype)
    axes = whole_numbers(call.numbers(3)) if call.given(3) else list(range(len(operand.shape)))
    if pads is None or axes is None:
        return Fact(tuple(call.unknown() for _ in operand.shape), operand.dtype)
    sizes = list(operand.shape)
    for place, axis in enumerate(axes):
        sizes[axis] = dim.add(sizes[axis], dim.add(pads[place], pads[place + len(axes)]))
    value = None
    if operand.value is not None and operand.value.ndim == 1 and (ends := whole_numbers(pads)) is not None:
        fill = call.fact(2).value
        constant = 0 if fill is None else fill.reshape(-1)[0]
        if min(ends) >= 0 and call.is_small([operand.value.size + sum(ends)]):
            value = np.concatenate(
                [np.full(ends[0], constant, object), operand.value, np.full(ends[1], constant, object)]
            )
    return Fact(tuple(sizes), operand.dtype, value)


def row_major_links(call: OperatorCall, target: int | None = None) -> AxisLinks:
    """Elements keep their row-major order."""
    return AxisLinks(inputs=parameters(call), outputs=((),), row_major=True, target=target)


def reshape_links(call: OperatorCall) -> AxisLinks:
    """`Reshape`: row-major order; input 1 is the target."""
    return row_major_links(call, target=1)


def squeeze_links(call: OperatorCall) -> AxisLinks:
    """`Squeeze`, `Unsqueeze`: axes of another size than 1 stay in their order."""
    before, after = call.fact(0).shape, call.result.shape
    if before is None or after is None:
        raise UntraceableAxesError("the rank of a tensor is unknown")
    anywhere = call.node.op_type == "Squeeze" and call.integers("axes", 1) is None
    if anywhere and not all(isinstance(size, int) for size in before):
        raise UntraceableAxesError("without axes, it drops every axis of size 1, also that of a single token")
    places = [[place for place, size in enumerate(shape) if size != 1] for shape in (before, after)]
    if len(places[0]) != len(places[1]):
        return row_major_links(call)
    labels = [
        tuple(found.index(place) if place in found else None for place in range(len(shape)))
        for found, shape in zip(places, (before, after), strict=True)
    ]
    return AxisLinks(inputs=parameters(call, labels[0]), outputs=(labels[1],))


def transpose_links(call: OperatorCall) -> AxisLinks:
    """`Transpose`: axes in the order of `perm`, reversed without one."""
    labels = identity_links(call)
    order = call.attribute("perm") or labels[::-1]
    return AxisLinks(inputs=(labels,), outputs=(tuple(order),))


def expand_links(call: OperatorCall) -> AxisLinks:
    """`Expand`: aligned from the right; input 1 is the target."""
    if call.result.shape is None:
        raise UntraceableAxesError("the rank of a tensor is unknown")
    rank = len(call.result.shape)
    inputs = parameters(call, tuple(range(rank - rank_of(call, 0), rank)))
    return AxisLinks(inputs=inputs, outputs=(tuple(range(rank)),), target=1)


def tile_links(call: OperatorCall) -> AxisLinks:
    """`Tile`: each axis repeated as a whole."""
    times = call.numbers(1)
    if times is None:
        raise UntraceableAxesError("the number of repeats is unknown")
    return kept(call, repeated=dict(enumerate(times)))


def concat_links(call: OperatorCall) -> AxisLinks:
    """`Concat`: the same axes in all inputs, concatenated along one."""
    indices = joined_inputs(call)
    rank = rank_of(call, indices[0])
    labels = tuple(range(rank))
    inputs = tuple(labels if index in indices else None for index in range(len(call.inputs)))
    return AxisLinks(inputs=inputs, outputs=(labels,), joined=axis_of(call.integer("axis", 0), rank))


def split_links(call: OperatorCall) -> AxisLinks:
    """`Split`: every output has a part of one axis."""
    labels = identity_links(call)
    axis = axis_of(call.integer("axis", 0), len(labels))
    if len(call.node.outputs) == 1:
        return kept(call)
    result = tuple(None if label == axis else label for label in labels)
    outputs = (result,) * len(call.node.outputs)
    return AxisLinks(inputs=parameters(call, labels), outputs=outputs, blocked={axis: None})


def pad_links(call: OperatorCall) -> AxisLinks:
    """`Pad`: elements are added before and after the axes that are named."""
    pads, rank = call.integers("pads", 1), rank_of(call, 0)
    places = call.numbers(3) if call.given(3) else tuple(range(rank))
    if pads is None:
        raise UntraceableAxesError("the pads are unknown")
    if places is None:
        raise UntraceableAxesError("the padded axes are unknown")
    named = [axis_of(int(axis), rank) for axis in places]
    ends = {axis: (pads[place], pads[place + len(named)]) for place, axis in enumerate(named)}
    padded: dict[Label, tuple[Dimension, Dimension]] = {axis: pair for axis, pair in ends.items() if any(pair)}
    repeats = call.text("mode", "constant") != "constant"
    blocked = dict.fromkeys(padded, "it repeats tokens at its ends") if repeats else {}
    return kept(call, mixed=frozenset(padded), padded=padded, blocked=blocked)


def trilu_links(call: OperatorCall) -> AxisLinks:
    """`Trilu`: a triangle of the last two axes is kept."""
    rank = rank_of(call, 0)
    return kept(call, diagonal=(rank - 2, rank - 1))


def resize_tile(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """`Tile`: lengths among the repeats are total lengths; one element is repeated as often as an axis asks for."""
    repeats, before, source = call.numbers(1), call.fact(0).shape, node.inputs[0]
    if repeats is None or before is None or source is None:
        return None
    single = {axis.axis for axis in axes if before[axis.axis] == 1}
    if any(repeats[axis.axis] != 1 for axis in axes if axis.axis not in single):
        return None
    after = resizer.sizes(call.result.shape or (), axes)
    numbers = [
        after[place] if place in single else resizer.lengths.at(times, Length.TOTAL)
        for place, times in enumerate(repeats)
    ]
    kept = tuple(axis for axis in axes if axis.axis not in single)
    return resizer.rebuilt(node, [resizer.slice_of(source, kept), resizer.lengths.vector(numbers)])


def resize_trilu(resizer: Resizer, node: ir.Node, call: OperatorCall, axes: Axes) -> ir.Value | None:
    """`Trilu`: the first new query is row `past_length`, so the diagonal moves by it."""
    source, rank = node.inputs[0], call.fact(0).rank
    offset = call.numbers(1) if len(node.inputs) > 1 and node.inputs[1] is not None else (0,)
    if source is None or rank is None or offset is None:
        return None
    diagonal = resizer.lengths.at(offset[0], Length.TOTAL)
    for axis in axes:
        if axis.variable.resolved() is Length.NEW and axis.axis >= rank - 2:
            if not axis.is_plain:
                return None
            diagonal = (
                dim.add(diagonal, resizer.lengths.past)
                if axis.axis == rank - 2
                else dim.subtract(diagonal, resizer.lengths.past)
            )
    return resizer.rebuilt(node, [resizer.slice_of(source, axes), resizer.lengths.scalar(diagonal)])


_FORM = (Trait.REARRANGE, Trait.RESHAPE)
_REPEAT = (Trait.REARRANGE, Trait.PARAMETERIZED, Trait.REPEAT)

OPERATORS: list[Operator] = [
    *entries("Reshape", reshape, reshape_links, *_FORM, Trait.PARAMETERIZED),
    *entries("Flatten", flatten, row_major_links, *_FORM),
    *entries("Unsqueeze", unsqueeze, squeeze_links, *_FORM, Trait.PARAMETERIZED),
    *entries("Squeeze", squeeze, squeeze_links, *_FORM, Trait.PARAMETERIZED),
    *entries("Transpose", transpose, transpose_links, Trait.REARRANGE, Trait.MOVE, Trait.TRANSPOSE),
    *entries("Expand", expand, expand_links, *_REPEAT),
    *entries("Tile", tile, tile_links, *_REPEAT, extent_inputs=frozenset({1}), resize=resize_tile),
    *entries("Concat", concat, concat_links, Trait.REARRANGE, Trait.MOVE),
    *entries("QLinearConcat", concat, concat_links, Trait.MOVE),
    *entries("Split", split, split_links, Trait.REARRANGE, Trait.PARAMETERIZED, Trait.SELECT),
    *entries("Pad", pad, pad_links, Trait.PARAMETERIZED, Trait.ANALYTIC),
    *entries("Trilu", unary, trilu_links, Trait.ELEMENTWISE, Trait.ANALYTIC, resize=resize_trilu),
]
