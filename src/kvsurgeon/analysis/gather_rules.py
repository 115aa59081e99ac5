"""Operators that pick or overwrite places named by numbers: rows of a table, or places of axes without tokens."""

from __future__ import annotations

from kvsurgeon.analysis.call_indices import is_grid, is_of_new_tokens
from kvsurgeon.analysis.elementwise_rules import broadcast
from kvsurgeon.analysis.token_flow import NodeVisit
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic.fact import axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis


def gather(step: NodeVisit) -> list[Axes]:
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
    if step.kind(1) is ValueKind.TOKEN:
        if step.kind(0) is ValueKind.TOKEN and step.axes(0):
            raise step.refusal("tokens index a table that other tokens made")
        result += [held.at(held.axis + axis) for held in step.axes(1)]
        _demand_rows(step, axis)
    return [tuple(sorted(result, key=lambda held: held.axis))]


def _demand_rows(step: NodeVisit, axis: int) -> None:
    """Note that tokens look up rows of context that has one for each place: it must have them all."""
    if step.kind(0) is ValueKind.CONTEXT and step.shape(0)[axis] == step.flow.length:
        step.demand(0, (SequenceAxis(axis, LengthVariable(Length.TOTAL)),))


def _picks_last(step: NodeVisit, held: SequenceAxis) -> bool:
    """Whether the indices name the last token, which is the same in both lengths."""
    indices = step.call.numbers(1)
    if indices is None or len(indices) != 1 or not held.is_plain or held.role.resolved() is not Length.NEW:
        return False
    return indices[0] == -1


def gather_elements(step: NodeVisit) -> list[Axes]:
    """`GatherElements`, `ScatterElements`: along an axis without tokens, the others aligned; or a table's elements."""
    looked_up = step.node.op_type == "GatherElements" and step.kind(0) is not ValueKind.TOKEN
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


def gather_nd(step: NodeVisit) -> list[Axes]:
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


def _by_place(step: NodeVisit) -> UnsupportedError:
    return UnsupportedError(
        f"{step.node.op_type} picks tokens by their place in the sequence",
        at=step.node.outputs[0].name,
        found=f"indices `{step.node.inputs[1].name if step.node.inputs[1] else ''}`",
    )


def scatter_nd(step: NodeVisit) -> list[Axes]:
    """`ScatterND`: places of axes without tokens are overwritten; the updates' last axes are the data's."""
    indices = step.shape(1)
    addressed = indices[-1]
    if not isinstance(addressed, int) or step.kind(1) is ValueKind.TOKEN:
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
        if step.kind(index) is not ValueKind.TOKEN:
            step.demand(index, axes)
        elif len(step.axes(index)) != len(axes):
            raise step.refusal("a tensor's tokens were lost sight of", at=step.node.inputs[index])
    return [tuple(found[place] for place in sorted(found))]


def _addresses_block(step: NodeVisit, addressed: int) -> bool:
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
