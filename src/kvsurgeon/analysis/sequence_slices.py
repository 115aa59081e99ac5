"""Operators that cut or extend the sequence axis: right for the keys of a query, and for the last token."""

from __future__ import annotations

from collections.abc import Sequence

from kvsurgeon.analysis.axis_merging import linked_tokens, placed
from kvsurgeon.analysis.token_flow import NodeVisit, is_of_queries
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.ops.gather import FAR
from kvsurgeon.ops.operator import AxisLinks, Label
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis


def selected(visit: NodeVisit, links: AxisLinks, traced: dict[Label, SequenceAxis]) -> dict[Label, SequenceAxis]:
    """Return what a slice leaves of each sequence axis; one of which only the last token is left is none any more."""
    result: dict[Label, SequenceAxis] = {}
    for label, axis in traced.items():
        kept = axis if label not in links.selected else _cut(visit, axis, *links.selected[label])
        if label in links.selected:
            variable = (kept or axis).variable
            visit.parameter(tuple(index for index, one in links.length_inputs if one == label), variable)
        if kept is not None:
            result[label] = kept
    return result


def _cut(visit: NodeVisit, axis: SequenceAxis, start: Dimension, end: Dimension, step: int) -> SequenceAxis | None:
    before, after = visit.shape(0)[axis.axis], visit.result_shape()[axis.axis]
    to_end = _is_end(end, before)
    if axis.most is not None and not visit.holds_length(after):
        visit.mix_along(axis)  # some of the ranks
        return None
    if step == 1 and to_end and start == 0:
        return axis
    if step == 1 and axis.without_rows.is_plain and axis.variable.resolved() is not Length.NEW:
        left = _without_learned_rows(axis, start, end, before)
        if left is None and start == 0:
            return _without_sinks(visit, axis, end)
        if left is not None:
            visit.mix_along(axis)
            return left
    if step == start == -1 and axis.variable.resolved() is not Length.NEW and dim.is_equal(before, after):
        visit.mix_along(axis)  # all keys in reverse
        return axis
    if step == 1 and axis.is_plain and to_end and is_last(start, before) and after == 1:
        visit.flow.last.update(visit.node.outputs)
        return None  # the last of the new tokens is the last of all
    raise UnsupportedError(
        f"{visit.node.op_type} selects tokens by their position in the sequence", code=Code.SELECTS_BY_POSITION,
        at=visit.node.outputs[0].name, found=f"[{start}:{end}:{step}] along the sequence",
    )  # fmt: skip


def _without_learned_rows(axis: SequenceAxis, start: Dimension, end: Dimension, size: Dimension) -> SequenceAxis | None:
    """The keys' axis without some of its learned rows; None if something else is cut off."""
    rows_before = start if isinstance(start, int) and start >= 0 else dim.add(start, size)
    rows_after = 0 if _is_end(end, size) else dim.subtract(size, end)
    if isinstance(end, int) and end < 0:
        rows_after = -end
    if not isinstance(rows_before, int) or not isinstance(rows_after, int):
        return None
    return (
        axis.with_rows(-rows_before, -rows_after)
        if rows_before <= axis.rows_before and rows_after <= axis.rows_after
        else None
    )


def _without_sinks(visit: NodeVisit, axis: SequenceAxis, end: Dimension) -> SequenceAxis:
    """Columns that were concatenated rows_after the keys (attention sinks) are cut off again."""
    if (isinstance(end, int) and end < 0) or dim.is_equal(end, visit.flow.length):
        visit.mix_along(axis)
        return axis
    raise visit.refusal("it cuts the keys at a fixed position", found=f"[0:{end}]", code=Code.SELECTS_BY_POSITION)


def is_last(index: Dimension, size: Dimension) -> bool:
    """Return whether an index names the last element of an axis, counted from the end or from the front."""
    return index == -1 or dim.is_equal(dim.add(index, 1), size) is True


def _is_end(end: Dimension, size: Dimension) -> bool:
    return (isinstance(end, int) and end >= FAR) or dim.is_equal(end, size) is True


def concatenated(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """Concatenation along an axis without tokens, or of further columns to the keys of a query (attention sinks)."""
    joined = links.joined
    assert isinstance(joined, int)
    traced: dict[Label, SequenceAxis] = {}
    owner: dict[Label, int] = {}
    indices = [
        index for index, labels in enumerate(links.inputs) if labels is not None and visit.shape(index)[joined] != 0
    ]
    if len(indices) == 1 and visit.kind(indices[0]) is ValueKind.TOKEN:
        return [visit.axes(indices[0])]  # with nothing
    tokens = set(linked_tokens(visit, links.inputs)) & set(indices)
    for index in sorted(tokens, key=lambda index: is_of_queries(visit.axes(index))):
        for axis in visit.axes(index):
            if axis.axis == joined:
                if axis.variable.resolved() is Length.NEW:
                    raise _why_joined(visit, index)
                visit.mix_along(axis)
                traced.setdefault(joined, _with_columns(visit, index, axis, indices))
            elif axis.axis in traced:
                traced[axis.axis] = visit.meet((owner[axis.axis], traced[axis.axis]), (index, axis))
            else:
                traced[axis.axis], owner[axis.axis] = axis, index
    others = {label: axis for label, axis in traced.items() if label != joined}
    for index in indices:
        if visit.kind(index) is not ValueKind.TOKEN:
            visit.demand(index, tuple(others.values()))
        elif any(label not in {axis.axis for axis in visit.axes(index)} for label in others):
            raise visit.untraceable(index)
    return [placed(traced, links.outputs[0])]


def _with_columns(visit: NodeVisit, index: int, axis: SequenceAxis, indices: Sequence[int]) -> SequenceAxis:
    """The keys' axis with the columns that are concatenated to it, if their number is fixed."""
    rows = {other: visit.shape(other)[axis.axis] for other in indices if other != index}
    rows_before, rows_after = (
        [size for other, size in rows.items() if (other < index) is first] for first in (True, False)
    )
    if not all(isinstance(size, int) for size in (*rows_before, *rows_after)):
        return axis
    return axis.with_rows(sum(rows_before), sum(rows_after))


def _why_joined(visit: NodeVisit, index: int) -> UnsupportedError:
    """Why tokens cannot be concatenated to something: it is a past, or tokens of the model itself."""
    for other, value in enumerate(visit.node.inputs):
        if visit.kind(other) is ValueKind.TOKEN:
            continue
        for _ in range(8):
            node = None if value is None else value.producer()
            if node is None:
                break
            value = node.inputs[0] if node.inputs else None
        if value is not None and value.is_graph_input() and not value.is_initializer():
            return UnsupportedError(
                "the model already has a cache", at=value.name, expected="a model exported without one",
                found="a graph input that is concatenated to the tokens", code=Code.HAS_CACHE,
            )  # fmt: skip
    return visit.mixing()
