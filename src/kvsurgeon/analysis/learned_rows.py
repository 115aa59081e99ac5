"""Learned rows next to the tokens: keys and values that no token has, such as attention sinks or a key of zeros.

The new tokens have no such rows, so from there on the tensor must hold all tokens so far: keys, or values.
"""

from __future__ import annotations

from kvsurgeon.analysis.token_flow import NodeVisit
from kvsurgeon.ops.content import depends_on_input
from kvsurgeon.ops.operator import AxisLinks
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable


def with_learned_rows(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """Return the sequence axis of a result that has learned rows next to the tokens.

    Raises:
        UnsupportedError: The node does not add a fixed number of rows to one tensor of tokens.
    """
    if isinstance(links.joined, int):
        return [_concatenated(visit, links, links.joined)]
    if visit.call.text("mode", "constant") != "constant" or visit.tokens != (0,):
        raise visit.mixing()
    axis = next((axis.axis for axis in visit.axes(0) if axis.axis in links.padded), None)
    if axis is None:
        raise visit.mixing()
    rows_before, rows_after = links.padded[axis]
    if not isinstance(rows_before, int) or not isinstance(rows_after, int) or min(rows_before, rows_after) < 0:
        raise visit.mixing()
    return [_widened(visit, 0, axis, rows_before, rows_after)]


def _concatenated(visit: NodeVisit, links: AxisLinks, joined: int) -> Axes:
    """One tensor of tokens, and others with a fixed number of rows that depend on no input."""
    if len(visit.tokens) != 1:
        raise visit.mixing()
    (mine,) = visit.tokens
    rows: list[int] = []
    for index, labels in enumerate(links.inputs):
        if labels is None:
            continue
        shape, value = visit.shape(index), visit.node.inputs[index]
        if index == mine:
            rows.append(0)
            continue
        size = shape[joined]
        if not isinstance(size, int) or any(visit.holds_length(one) for one in shape):
            raise visit.mixing()
        if value is not None and depends_on_input(value):
            raise visit.mixing()
        rows.append(size)
    return _widened(visit, mine, joined, sum(rows[:mine]), sum(rows[mine:]))


def _widened(visit: NodeVisit, index: int, axis: int, rows_before: int, rows_after: int) -> Axes:
    """The sequence axis with learned rows, in a variable that a product must decide to be the keys'."""
    axes = visit.axes(index)
    if len(axes) != 1 or axes[0].axis != axis or not axes[0].is_plain or axes[0].variable.resolved() is not Length.NEW:
        raise visit.mixing()
    name = visit.node.outputs[0].name or ""
    variable = LengthVariable(at=name, mixed_at=[name])
    place = visit.node, index
    visit.flow.operands[place] = visit.flow.learned_row_inputs[place] = variable
    return (axes[0].with_variable(variable).with_rows(rows_before, rows_after),)
