"""Broadcasting operators on token data: tokens meet tokens of the same place, context is aligned with them."""

from __future__ import annotations

from kvsurgeon.analysis.token_flow import NodeVisit, ScoreProduct
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis


def keep(step: NodeVisit) -> list[Axes]:
    """One tensor, element by element: the tokens stay where they are."""
    axes = step.axes(0)
    if step.kind(0) is not ValueKind.TOKEN:
        return broadcast(step)
    return [axes] * len(step.node.outputs)


def broadcast(step: NodeVisit, picked: int | None = None) -> list[Axes]:
    """Several tensors, broadcast against each other; of the first, an axis may be one that the others pick from."""
    rank = len(step.result_shape())
    found: dict[int, SequenceAxis] = {}
    owner: dict[int, int] = {}
    for index in sorted(step.tokens(), key=lambda index: is_of_stream(step.axes(index))):
        shift = rank - len(step.shape(index))
        for axis in step.axes(index):
            here = axis.at(axis.axis + shift)
            if here.axis in found:
                found[here.axis] = step.meet((owner[here.axis], found[here.axis]), (index, here))
            else:
                found[here.axis], owner[here.axis] = here, index
    _cross(step, found, owner)
    _bring(step, found, rank)
    for index in range(len(step.node.inputs)):
        if step.node.inputs[index] is not None:
            align(step, index, found, rank, picked if index == 0 else None)
    return [tuple(found[axis] for axis in sorted(found))] * len(step.node.outputs)


def is_of_stream(axes: Axes) -> bool:
    """Whether all of a tensor's tokens are those of the stream."""
    return all(axis.role.resolved() is Length.NEW for axis in axes)


def _bring(step: NodeVisit, found: dict[int, SequenceAxis], rank: int) -> None:
    """Context may bring an axis of length of its own: tokens that it meets may then be queries, or keys."""
    stream = [axis for axis in found.values() if axis.role.resolved() is Length.NEW]
    before = set(found)
    for index, value in enumerate(step.node.inputs):
        if value is None or step.kind(index) is ValueKind.TOKEN:
            continue
        for place, size in enumerate(step.shape(index), start=rank - len(step.shape(index))):
            if place not in found and step.holds_length(size):
                found[place] = brought(step, place, size)
    if before == set(found):
        return
    for axis in stream:
        role = LengthVariable(at=step.node.outputs[0].name or "")
        for index in step.tokens():
            place = axis.axis - rank + len(step.shape(index))
            if place in {held.axis for held in step.axes(index)}:
                found[axis.axis] = step.opened(axis, index, role)


def _cross(step: NodeVisit, found: dict[int, SequenceAxis], owner: dict[int, int]) -> None:
    """Two axes of the stream side by side: queries and keys meet, element by element."""
    stream = [axis for axis, at in found.items() if at.role.resolved() is Length.NEW]
    if len(stream) < 2:
        return
    first, second, *more = sorted(stream)
    if more or owner[first] == owner[second] or len(step.tokens()) != 2:
        raise step.mixing()
    name = step.node.outputs[0].name or ""
    left, right = LengthVariable(at=name), LengthVariable(at=name)
    step.flow.scores.append(
        ScoreProduct(node=step.node, left=owner[first], right=owner[second], left_role=left, right_role=right)
    )
    step.flow.operands[step.node, owner[first]] = left
    step.flow.operands[step.node, owner[second]] = right
    found[first], found[second] = found[first].with_role(left), found[second].with_role(right)


def align(step: NodeVisit, index: int, found: dict[int, SequenceAxis], rank: int, picked: int | None = None) -> None:
    """Demand of an input what the result's sequence axes ask of it, but for the axis that others pick from."""
    shape = step.shape(index)
    shift = rank - len(shape)
    token = step.kind(index) is ValueKind.TOKEN
    own = {axis.axis + shift for axis in step.axes(index)} if token else set()
    wanted: list[SequenceAxis] = []
    for place, size in enumerate(shape):
        axis = place + shift
        if size == 1 or axis in own or axis == picked:
            continue
        if axis in found:
            if token:
                raise step.refusal("a tensor's tokens were lost sight of", at=step.node.inputs[index])
            _check_size(step, index, found[axis], size)
            wanted.append(found[axis].at(place))
        elif step.holds_length(size):
            raise step.refusal("a tensor's tokens were lost sight of", at=step.node.inputs[index])
    if not token:
        step.demand(index, tuple(wanted))


def _check_size(step: NodeVisit, index: int, axis: SequenceAxis, size: Dimension) -> None:
    """Context is cut to the tokens' length only where it surely has it."""
    whole = axis.size(step.flow.length)
    if axis.role.resolved() is Length.NEW and not dim.is_equal(size, whole):
        raise step.refusal(
            "context that meets the tokens does not surely have their length", at=step.node.inputs[index],
            expected=str(whole), found=str(size),
        )  # fmt: skip


def brought(step: NodeVisit, axis: int, size: Dimension) -> SequenceAxis:
    """An axis of length that context brings to token data: relative positions, for one."""
    if size is not step.flow.length:
        raise step.refusal("context brings an axis of another length", found=str(size))
    return SequenceAxis(axis, LengthVariable(at=step.node.outputs[0].name or "", bias=True))
