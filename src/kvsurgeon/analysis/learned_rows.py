"""Rows of the model's own that are put beside the tokens: keys and values that were learnt, or a key of nothing.

No position of the stream has such a row, so from there on the tokens must be all so far: keys, or values.
"""

from __future__ import annotations

from collections.abc import Callable

from kvsurgeon.analysis.token_flow import NodeVisit
from kvsurgeon.graph.query import depends_on_input
from kvsurgeon.ops.layout import joined_inputs
from kvsurgeon.symbolic.fact import axis_of
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable


def concat(step: NodeVisit) -> list[Axes]:
    """`Concat` along the sequence, of one tensor of tokens and of others with a fixed number of rows."""
    rank = len(step.result_shape())
    joined = axis_of(step.call.integer("axis", 0), rank)
    if len(step.tokens()) != 1:
        raise step.mixing()
    (mine,) = step.tokens()
    rows: list[int] = []
    for index in joined_inputs(step.call):
        shape, value = step.shape(index), step.node.inputs[index]
        if index == mine:
            rows.append(0)
            continue
        if not isinstance(shape[joined], int) or any(step.holds_length(size) for size in shape):
            raise step.mixing()
        if value is not None and depends_on_input(value):
            raise step.mixing()
        rows.append(shape[joined])
    return [_bordered(step, mine, joined, sum(rows[:mine]), sum(rows[mine:]))]


def pad(step: NodeVisit) -> list[Axes]:
    """`Pad` along the sequence, with rows of one number."""
    pads, rank = step.call.integers("pads", 1), len(step.shape(0))
    places = step.call.numbers(3) if step.call.given(3) else tuple(range(rank))
    if pads is None or places is None or step.call.text("mode", "constant") != "constant" or step.tokens() != [0]:
        raise step.mixing()
    padded = [axis_of(int(axis), rank) for axis in places]
    ends = {axis: (pads[place], pads[place + len(padded)]) for place, axis in enumerate(padded)}
    axis = next((axis.axis for axis in step.axes(0) if any(ends.get(axis.axis, (0, 0)))), None)
    if axis is None or min(ends[axis]) < 0:
        raise step.mixing()
    return [_bordered(step, 0, axis, *ends[axis])]


RULES: dict[str, Callable[[NodeVisit], list[Axes]]] = {"Concat": concat, "Pad": pad}


def _bordered(step: NodeVisit, index: int, axis: int, ahead: int, behind: int) -> Axes:
    """Where the tokens of an input are with rows beside them: in a role that products must tell to be the keys'."""
    axes = step.axes(index)
    if len(axes) != 1 or axes[0].axis != axis or not axes[0].is_plain or axes[0].role.resolved() is not Length.NEW:
        raise step.mixing()
    name = step.node.outputs[0].name or ""
    role = LengthVariable(at=name, only_if_total=[name])
    place = step.node, index
    step.flow.operands[place] = step.flow.bordered[place] = role
    return (axes[0].with_role(role).widened(ahead, behind),)
