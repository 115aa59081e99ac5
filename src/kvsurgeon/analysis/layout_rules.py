"""Operators that move token data without computing: the tokens are followed to their new place."""

from __future__ import annotations

from dataclasses import replace

from kvsurgeon.analysis.elementwise_rules import brought
from kvsurgeon.analysis.token_flow import NodeVisit
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.ops.slicing import FAR, slice_bounds
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.fact import axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis, follow_reshape


def _followed(step: NodeVisit) -> Axes:
    after = step.result_shape()
    axes = follow_reshape(step.axes(0), step.shape(0), after, step.flow.length)
    if axes is None:
        raise step.refusal(
            "the tokens' axis is cut in two, or cannot be found again",
            expected="an axis of size batch * length * heads or the like",
            found=f"{_spelled(step.shape(0))} -> {_spelled(after)}",
        )
    return axes


def _spelled(shape: tuple[dim.Dimension, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def reshape(step: NodeVisit) -> list[Axes]:
    """`Reshape`: row-major order tells where the tokens are afterwards."""
    if step.kind(0) is not ValueKind.TOKEN:
        raise UnsupportedError("Reshape: its target depends on the tokens", at=step.node.outputs[0].name)
    step.flow.targets[step.node] = 1
    return [_followed(step)]


def flatten(step: NodeVisit) -> list[Axes]:
    """`Flatten`, `Squeeze`, `Unsqueeze`: reshapes without a target of their own."""
    return [_followed(step)]


def unsqueeze(step: NodeVisit) -> list[Axes]:
    """`Unsqueeze`, `Squeeze`: axes of size 1 come and go."""
    kept = [place for place, size in enumerate(step.shape(0)) if size != 1]
    then = [place for place, size in enumerate(step.result_shape()) if size != 1]
    if len(kept) != len(then):
        return [_followed(step)]
    moves = dict(zip(kept, then, strict=True))
    return [tuple(axis.at(moves[axis.axis]) for axis in step.axes(0))]


def transpose(step: NodeVisit) -> list[Axes]:
    """`Transpose`: axes in another order."""
    order = step.call.attribute("perm") or tuple(reversed(range(len(step.shape(0)))))
    moved = [axis.at(list(order).index(axis.axis)) for axis in step.axes(0)]
    return [tuple(sorted(moved, key=lambda axis: axis.axis))]


def expand(step: NodeVisit) -> list[Axes]:
    """`Expand`: along axes that hold no tokens."""
    if step.kind(0) is not ValueKind.TOKEN:
        raise UnsupportedError("Expand: its target depends on the tokens", at=step.node.outputs[0].name)
    after = step.result_shape()
    shift = len(after) - len(step.shape(0))
    axes = tuple(axis.at(axis.axis + shift) for axis in step.axes(0))
    held = {axis.axis for axis in axes}
    new = [place for place, size in enumerate(after) if place not in held and step.holds_length(size)]
    if new:  # queries spread along the keys, or keys along the queries
        axes = tuple(step.opened(axis, 0) if axis.role.resolved() is Length.NEW else axis for axis in axes)
        axes += tuple(brought(step, place, after[place]) for place in new)
    step.flow.targets[step.node] = 1
    return [tuple(sorted(axes, key=lambda axis: axis.axis))]


def tile(step: NodeVisit) -> list[Axes]:
    """`Tile`: the whole axis so many times over, so that the copies are counted outside the tokens."""
    repeats = step.call.numbers(1)
    if repeats is None:
        raise step.refusal("how often it repeats is unknown")
    if any(step.holds_length(times) for times in repeats):
        raise step.refusal("it repeats token data as often as there are tokens")
    axes = step.axes(0)
    return [tuple(replace(axis, outer=dim.multiply(repeats[axis.axis], axis.outer)) for axis in axes)]


def split(step: NodeVisit) -> list[Axes]:
    """`Split`: along an axis that holds no tokens."""
    axis = axis_of(step.call.integer("axis", 0), len(step.shape(0)))
    for held in step.axes(0):
        if held.axis == axis and len(step.node.outputs) > 1:
            raise step.mixing()
    return [step.axes(0)] * len(step.node.outputs)


def slice_(step: NodeVisit) -> list[Axes]:
    """`Slice`: along axes without tokens; of the keys of a query; or of the last token."""
    axes, bounds = step.axes(0), slice_bounds(step.call)
    if bounds is None:
        named = step.call.integers("axes", 3)
        for axis in axes:
            if named is None or axis.axis in {axis_of(int(place), len(step.shape(0))) for place in named}:
                raise step.refusal("its bounds along the sequence are unknown")
        return [axes]
    result = []
    for axis in axes:
        cut = next((cut for cut in zip(*bounds, strict=True) if cut[0] == axis.axis), None)
        kept = axis if cut is None else _cut(step, axis, *cut[1:])
        if kept is not None:
            result.append(kept)
            if cut is not None:
                step.parameter((1, 2), kept.role)
    return [tuple(result)]


def _cut(
    step: NodeVisit, axis: SequenceAxis, start: dim.Dimension, end: dim.Dimension, jump: int
) -> SequenceAxis | None:
    """What a `Slice` along a sequence axis leaves of it; None where that is no sequence any more."""
    before, after = step.shape(0)[axis.axis], step.result_shape()[axis.axis]
    to_end = _is_end(end, before)
    if jump == 1 and to_end and (start == 0 or dim.is_equal(dim.add(start, before), 0)):
        return axis
    if jump == 1 and axis.bare.is_plain and axis.role.resolved() is not Length.NEW:
        left = _without_border(axis, start, end, before)
        if left is None and start == 0:
            return _without_sinks(step, axis, end)
        if left is not None:
            step.works_along(axis)
            return left
    if jump == start == -1 and axis.role.resolved() is not Length.NEW and dim.is_equal(before, after):
        step.works_along(axis)  # all keys, the last one first
        return axis
    if jump == 1 and axis.is_plain and to_end and start == -1 and after == 1:
        step.flow.last.update(step.node.outputs)
        return None  # the last of the new tokens is the last of all
    raise UnsupportedError(
        "Slice picks some of the tokens by their place in the sequence",
        at=step.node.outputs[0].name,
        found=f"[{start}:{end}:{jump}] along the sequence",
    )


def _without_border(
    axis: SequenceAxis, start: dim.Dimension, end: dim.Dimension, size: dim.Dimension
) -> SequenceAxis | None:
    """The keys' axis without some of the rows beside the tokens; None where it is something else that is cut off."""
    ahead = start if isinstance(start, int) and start >= 0 else dim.add(start, size)
    behind = 0 if _is_end(end, size) else dim.subtract(size, end)
    if isinstance(end, int) and end < 0:
        behind = -end
    if not isinstance(ahead, int) or not isinstance(behind, int):
        return None
    return axis.widened(-ahead, -behind) if ahead <= axis.ahead and behind <= axis.behind else None


def _without_sinks(step: NodeVisit, axis: SequenceAxis, end: dim.Dimension) -> SequenceAxis:
    """Columns that were joined behind the keys (attention sinks) are cut off again."""
    if (isinstance(end, int) and end < 0) or dim.is_equal(end, step.flow.length):
        step.works_along(axis)
        return axis
    raise step.refusal("it cuts the keys at a fixed place", found=f"[0:{end}]")


def _is_end(end: dim.Dimension, size: dim.Dimension) -> bool:
    return (isinstance(end, int) and end >= FAR) or dim.is_equal(end, size) is True


def trilu(step: NodeVisit) -> list[Axes]:
    """`Trilu`: over two axes without tokens, or over queries and keys, whose diagonal moves with the past."""
    axes, rank = step.axes(0), len(step.shape(0))
    sides = {held.axis: held for held in axes if held.axis >= rank - 2}
    if not sides:
        return [axes]
    if len(sides) == 1 or not all(held.is_plain for held in sides.values()):
        raise step.mixing()
    if step.call.given(1) is not None and step.call.numbers(1) is None:
        raise step.refusal("its diagonal is unknown")
    step.flow.diagonals[step.node] = sides[rank - 2].role, sides[rank - 1].role
    return [axes]


def one_hot(step: NodeVisit) -> list[Axes]:
    """`OneHot`: a new axis beside the tokens'."""
    rank = len(step.shape(0)) + 1
    axis = axis_of(step.call.integer("axis", -1), rank)
    return [tuple(held if held.axis < axis else held.at(held.axis + 1) for held in step.axes(0))]
