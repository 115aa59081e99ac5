"""Operators that move token data without computing: the tokens are followed to their new place."""

from __future__ import annotations

from dataclasses import replace

from kvsurgeon.errors import Refused
from kvsurgeon.sequence.addresses import is_grid, is_of_new_tokens
from kvsurgeon.sequence.axes import Axes, Length, Role, SequenceAxis, follow_reshape
from kvsurgeon.sequence.elementwise import broadcast, brought
from kvsurgeon.sequence.flow import Step
from kvsurgeon.sequence.kinds import Kind
from kvsurgeon.shapes import dimension as dim
from kvsurgeon.shapes.fact import axis_of
from kvsurgeon.shapes.slicing import FAR, slice_bounds


def _followed(step: Step) -> Axes:
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


def reshape(step: Step) -> list[Axes]:
    """`Reshape`: row-major order tells where the tokens are afterwards."""
    if step.kind(0) is not Kind.TOKEN:
        raise Refused("Reshape: its target depends on the tokens", at=step.node.outputs[0].name)
    step.flow.targets[step.node] = 1
    return [_followed(step)]


def flatten(step: Step) -> list[Axes]:
    """`Flatten`, `Squeeze`, `Unsqueeze`: reshapes without a target of their own."""
    return [_followed(step)]


def unsqueeze(step: Step) -> list[Axes]:
    """`Unsqueeze`, `Squeeze`: axes of size 1 come and go."""
    kept = [place for place, size in enumerate(step.shape(0)) if size != 1]
    then = [place for place, size in enumerate(step.result_shape()) if size != 1]
    if len(kept) != len(then):
        return [_followed(step)]
    moves = dict(zip(kept, then, strict=True))
    return [tuple(axis.at(moves[axis.axis]) for axis in step.axes(0))]


def transpose(step: Step) -> list[Axes]:
    """`Transpose`: axes in another order."""
    order = step.call.attribute("perm") or tuple(reversed(range(len(step.shape(0)))))
    moved = [axis.at(list(order).index(axis.axis)) for axis in step.axes(0)]
    return [tuple(sorted(moved, key=lambda axis: axis.axis))]


def expand(step: Step) -> list[Axes]:
    """`Expand`: along axes that hold no tokens."""
    if step.kind(0) is not Kind.TOKEN:
        raise Refused("Expand: its target depends on the tokens", at=step.node.outputs[0].name)
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


def tile(step: Step) -> list[Axes]:
    """`Tile`: the whole axis so many times over, so that the copies are counted outside the tokens."""
    repeats = step.call.numbers(1)
    if repeats is None:
        raise step.refusal("how often it repeats is unknown")
    if any(step.holds_length(times) for times in repeats):
        raise step.refusal("it repeats token data as often as there are tokens")
    axes = step.axes(0)
    return [tuple(replace(axis, outer=dim.multiply(repeats[axis.axis], axis.outer)) for axis in axes)]


def split(step: Step) -> list[Axes]:
    """`Split`: along an axis that holds no tokens."""
    axis = axis_of(step.call.integer("axis", 0), len(step.shape(0)))
    for held in step.axes(0):
        if held.axis == axis and len(step.node.outputs) > 1:
            raise step.mixing()
    return [step.axes(0)] * len(step.node.outputs)


def slice_(step: Step) -> list[Axes]:
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


def _cut(step: Step, axis: SequenceAxis, start: dim.Dimension, end: dim.Dimension, jump: int) -> SequenceAxis | None:
    """What a `Slice` along a sequence axis leaves of it; None where that is no sequence any more."""
    before, after = step.shape(0)[axis.axis], step.result_shape()[axis.axis]
    to_end = _is_end(end, before)
    if jump == 1 and to_end and (start == 0 or dim.is_equal(dim.add(start, before), 0)):
        return axis
    if jump == 1 and axis.is_plain and axis.role.resolved() is not Length.NEW and start == 0:
        return _without_sinks(step, axis, end)
    if jump == start == -1 and axis.role.resolved() is not Length.NEW and dim.is_equal(before, after):
        step.works_along(axis)  # all keys, the last one first
        return axis
    if jump == 1 and axis.is_plain and to_end and start == -1 and after == 1:
        step.flow.last.update(step.node.outputs)
        return None  # the last of the new tokens is the last of all
    raise Refused(
        "Slice picks some of the tokens by their place in the sequence",
        at=step.node.outputs[0].name,
        found=f"[{start}:{end}:{jump}] along the sequence",
    )


def _without_sinks(step: Step, axis: SequenceAxis, end: dim.Dimension) -> SequenceAxis:
    """Columns that were joined behind the keys (attention sinks) are cut off again."""
    if (isinstance(end, int) and end < 0) or dim.is_equal(end, step.flow.length):
        step.works_along(axis)
        return axis
    raise step.refusal("it cuts the keys at a fixed place", found=f"[0:{end}]")


def _is_end(end: dim.Dimension, size: dim.Dimension) -> bool:
    return (isinstance(end, int) and end >= FAR) or dim.is_equal(end, size) is True


def gather(step: Step) -> list[Axes]:
    """`Gather`: rows of a table for each token, or one place of an axis without tokens."""
    axis = axis_of(step.call.integer("gather_axis", step.call.integer("axis", 0)), len(step.shape(0)))
    picked = len(step.shape(1))
    result: list[SequenceAxis] = []
    for held in step.axes(0):
        if held.axis == axis:
            if _picks_last(step, held):
                step.flow.last.update(step.node.outputs)
                continue
            raise _by_place(step)
        result.append(held if held.axis < axis else held.at(held.axis + picked - 1))
    if step.kind(1) is Kind.TOKEN:
        if step.kind(0) is Kind.TOKEN and step.axes(0):
            raise step.refusal("tokens index a table that other tokens made")
        result += [held.at(held.axis + axis) for held in step.axes(1)]
        _demand_rows(step, axis)
    return [tuple(sorted(result, key=lambda held: held.axis))]


def _demand_rows(step: Step, axis: int) -> None:
    """Note that tokens look up rows of context that has one for each place: it must have them all."""
    if step.kind(0) is Kind.CONTEXT and step.shape(0)[axis] == step.flow.length:
        step.demand(0, (SequenceAxis(axis, Role(Length.TOTAL)),))


def _picks_last(step: Step, held: SequenceAxis) -> bool:
    """Whether the indices name the last token, which is the same in both lengths."""
    indices = step.call.numbers(1)
    if indices is None or len(indices) != 1 or not held.is_plain or held.role.resolved() is not Length.NEW:
        return False
    return indices[0] == -1


def gather_elements(step: Step) -> list[Axes]:
    """`GatherElements`, `ScatterElements`: along an axis without tokens, the others aligned; or a table's elements."""
    looked_up = step.node.op_type == "GatherElements" and step.kind(0) is not Kind.TOKEN
    axis = axis_of(step.call.integer("axis", 0), len(step.shape(0)))
    others = [size for place, size in enumerate(step.shape(0)) if place != axis]
    if looked_up and step.flow.length not in others:
        _demand_rows(step, axis)
        return [step.axes(1)]
    for index in step.tokens():
        for held in step.axes(index):
            if held.axis == axis and step.node.op_type == "ScatterElements":
                raise step.mixing()
            if held.axis == axis:
                step.works_along(held)
    return broadcast(step, axis)


def gather_nd(step: Step) -> list[Axes]:
    """`GatherND`: rows of a table for each token, or places of axes without tokens."""
    batch_axes, indices = step.call.integer("batch_dims", 0), step.shape(1)
    addressed = indices[-1]
    if not isinstance(addressed, int):
        raise step.refusal("how many axes it addresses is unknown")
    shift = len(indices) - 1 - batch_axes - addressed
    result: dict[int, SequenceAxis] = {}
    for held in step.axes(0):
        if batch_axes <= held.axis < batch_axes + addressed:
            raise _by_place(step)
        place = held.axis if held.axis < batch_axes else held.axis + shift
        result[place] = held.at(place)
    for held in step.axes(1):
        if held.axis == len(indices) - 1:
            raise _by_place(step)
        if held.axis in result:
            held = step.meet((0, result[held.axis]), (1, held))
        elif step.axes(0):
            raise step.refusal("tokens index a table that other tokens made")
        result[held.axis] = held
    return [tuple(result[place] for place in sorted(result))]


def _by_place(step: Step) -> Refused:
    return Refused(
        f"{step.node.op_type} picks tokens by their place in the sequence",
        at=step.node.outputs[0].name,
        found=f"indices `{step.node.inputs[1].name if step.node.inputs[1] else ''}`",
    )


def scatter_nd(step: Step) -> list[Axes]:
    """`ScatterND`: places of axes without tokens are overwritten; the updates' last axes are the data's."""
    indices = step.shape(1)
    addressed = indices[-1]
    if not isinstance(addressed, int) or step.kind(1) is Kind.TOKEN:
        raise step.refusal("where it writes depends on the tokens, or is unknown")
    shift = addressed - (len(indices) - 1)
    block = shift == 0 and _addresses_block(step, addressed)
    found: dict[int, SequenceAxis] = {}
    for index, offset in ((0, 0), (2, shift)):
        for held in step.axes(index):
            place = held.axis + offset
            if not block and (place < addressed or (index == 2 and held.axis < len(indices) - 1)):
                raise _by_place(step)
            here = held.at(place)
            found[place] = step.meet((0, found[place]), (index, here)) if place in found else here
    for index, offset in ((0, 0), (2, shift)):
        axes = tuple(held.at(place - offset) for place, held in sorted(found.items()))
        if step.kind(index) is not Kind.TOKEN:
            step.demand(index, axes)
        elif len(step.axes(index)) != len(axes):
            raise step.refusal("a tensor's tokens were lost sight of", at=step.node.inputs[index])
    return [tuple(found[place] for place in sorted(found))]


def _addresses_block(step: Step, addressed: int) -> bool:
    """Whether the indices name every token in order, as where some features of all tokens are written."""
    indices = step.node.inputs[1]
    whole = {held.axis for index in (0, 2) for held in step.axes(index) if held.axis < addressed}
    if indices is None or not whole or not is_of_new_tokens(step.flow, indices):
        return False
    batch = {place for place in range(addressed) if step.flow.batch in (step.shape(1)[place],)}
    if not is_grid(step.flow, indices, whole | batch):
        return False
    step.flow.addresses.add((step.node, 1))
    return True


def trilu(step: Step) -> list[Axes]:
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


def one_hot(step: Step) -> list[Axes]:
    """`OneHot`: a new axis beside the tokens'."""
    rank = len(step.shape(0)) + 1
    axis = axis_of(step.call.integer("axis", -1), rank)
    return [tuple(held if held.axis < axis else held.at(held.axis + 1) for held in step.axes(0))]
