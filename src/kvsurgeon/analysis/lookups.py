"""Operators that read or overwrite elements at given places: rows of a table, or elements of axes without tokens."""

from __future__ import annotations

from collections.abc import Callable

from kvsurgeon.analysis.axis_merging import merge, placed
from kvsurgeon.analysis.call_indices import addresses_block, count_of_last, follows_query_length
from kvsurgeon.analysis.sequence_slices import is_last
from kvsurgeon.analysis.token_flow import NodeVisit
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.operator import AxisLinks, Label, Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis


def gather(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """`Gather`: rows of a table for each token, or elements of an axis without tokens."""
    table, indices, result = links.inputs[0] or (), links.inputs[1] or (), links.outputs[0]
    traced: dict[Label, SequenceAxis] = {}
    for axis in visit.axes(0):
        label = table[axis.axis]
        if label in result:
            traced[label] = axis  # type: ignore[index]
        elif axis.most is not None:
            visit.mix_along(axis)
            visit.parameter((1,), axis.variable)
        elif _selects_last(visit, axis) or _selects_counted(visit, axis):
            visit.flow.last.update(visit.node.outputs)
        elif axis.outer == visit.flow.batch != 1:
            raise _by_address(visit)
        else:
            raise _by_position(visit)
    if visit.kind(1) is ValueKind.TOKEN:
        if visit.kind(0) is ValueKind.TOKEN and visit.axes(0):
            raise visit.refusal("tokens index a table that other tokens made")
        traced |= {indices[axis.axis]: axis for axis in visit.axes(1)}  # type: ignore[misc]
        columns = _demand_rows(visit, next(place for place, label in enumerate(table) if label not in result))
        traced |= {table[axis.axis]: axis for axis in columns}  # type: ignore[misc]
    return [placed(traced, result)]


def _demand_rows(visit: NodeVisit, axis: int) -> Axes:
    """Note that tokens look up rows of context: of one that has a row for each place, it must have them all.

    Return the other axes of the context that are as long as the text, such as the columns of a mask.
    """
    if visit.kind(0) is not ValueKind.CONTEXT:
        return ()
    long = [place for place, size in enumerate(visit.shape(0)) if size == visit.flow.length]
    at = visit.node.outputs[0].name or ""
    axes = [SequenceAxis(place, LengthVariable(Length.TOTAL if place == axis else None, at=at)) for place in long]
    if axes:
        visit.demand(0, tuple(axes))
    return tuple(one for one in axes if one.axis != axis)


def _selects_last(visit: NodeVisit, traced: SequenceAxis) -> bool:
    """Whether the indices name the last token, which is the same in both lengths."""
    indices = visit.call.numbers(1)
    if indices is None or len(indices) != 1 or not traced.is_plain or traced.variable.resolved() is not Length.NEW:
        return False
    visit.parameter((1,), traced.variable)
    return is_last(indices[0], visit.shape(0)[traced.axis])


def _selects_counted(visit: NodeVisit, traced: SequenceAxis) -> bool:
    """Whether the indices name the last tokens of a call, of which an input gives the number; it is noted if so."""
    indices = visit.node.inputs[1]
    is_plain = traced.is_plain and traced.variable.resolved() is Length.NEW
    if indices is None or not is_plain or len(visit.shape(1)) != 1 or visit.kind(1) is not ValueKind.CONTEXT:
        return False
    count = count_of_last(visit.flow, indices)
    if count is not None:
        visit.flow.counts[visit.node] = count
        visit.flow.addresses.add((visit.node, 1))
    return count is not None


def gather_elements(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """`GatherElements`, `ScatterElements`: along an axis without tokens, the others aligned; or a table's elements."""
    is_lookup = has_trait(visit.node, Trait.LOOKUP)
    looked_up = is_lookup and visit.kind(0) is not ValueKind.TOKEN
    (axis,) = (label for label in links.mixed if isinstance(label, int))
    others = [size for place, size in enumerate(visit.shape(0)) if place != axis]
    if looked_up and visit.flow.length not in others:
        _demand_rows(visit, axis)
        return [visit.axes(1)]
    for index in visit.tokens:
        for traced in visit.axes(index):
            if traced.axis == axis:
                visit.mix_along(traced)
    merged = merge(visit, links.inputs, unaligned=axis)
    mine, given = next((one for one in visit.axes(0) if one.axis == axis), None), merged.get(axis)
    if mine is not None and given is not None and not mine.variable.agree(given.variable):
        raise visit.untraceable(1)
    written = mine if given is None else mine or given._replace(most=None)
    if written is not None and not is_lookup:
        merged[axis] = written
        if visit.kind(0) is not ValueKind.TOKEN:
            visit.demand(0, placed(merged, links.outputs[0]))
    return [placed(merged, links.outputs[0])]


def gather_nd(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """`GatherND`: rows of a table for each token, or elements of axes without tokens."""
    if not isinstance(visit.shape(1)[-1], int):
        raise visit.refusal("how many axes it addresses is unknown")
    traced: dict[Label, SequenceAxis] = {}
    for index in (0, 1):
        labels = links.inputs[index] or ()
        for axis in visit.axes(index):
            label = labels[axis.axis]
            if label is None:
                raise _by_position(visit)
            if label in traced:
                axis = visit.meet((0, traced[label]), (1, axis))
            elif index == 1 and visit.axes(0):
                raise visit.refusal("tokens index a table that other tokens made")
            traced[label] = axis
    data = links.inputs[0] or ()
    addressed = [place for place, label in enumerate(data) if label is None]
    if visit.kind(1) is ValueKind.TOKEN and len(addressed) == 1:
        traced |= {data[axis.axis]: axis for axis in _demand_rows(visit, *addressed)}  # type: ignore[misc]
    return [placed(traced, links.outputs[0])]


def _by_position(visit: NodeVisit) -> UnsupportedError:
    numbers = {given.value for given in visit.flow.inputs if not given.lengths}
    is_given = not numbers.isdisjoint(upstream([visit.node.inputs[1]]))
    hint = "export the logits of all tokens: num-logits-to-keep adds an input for the last ones"
    return _selects(visit, "selects tokens by their position in the sequence", hint=hint if is_given else None)


def _by_address(visit: NodeVisit) -> UnsupportedError:
    return _selects(
        visit,
        "reads tokens at their addresses in a flattened batch, which change with the length",
        expected="the tokens as [batch, sequence]",
    )


def _selects(visit: NodeVisit, what: str, *, expected: str | None = None, hint: str | None = None) -> UnsupportedError:
    indices = visit.node.inputs[1]
    return UnsupportedError(
        f"{visit.node.op_type} {what}",
        code=Code.SELECTS_BY_POSITION,
        at=visit.node.outputs[0].name,
        expected=expected,
        found=f"indices `{indices.name if indices else ''}`",
        hint=hint,
    )


def scatter_nd(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """`ScatterND`: places of axes without tokens are overwritten; the updates' last axes are the data's."""
    indices = visit.shape(1)
    addressed = indices[-1]
    if not isinstance(addressed, int) or visit.kind(1) is ValueKind.TOKEN:
        raise visit.refusal("where it writes depends on the tokens, or is unknown")
    shift = addressed - (len(indices) - 1)
    block = shift == 0 and _addresses_block(visit, addressed)
    found: dict[int, SequenceAxis] = {}
    for index, offset in ((0, 0), (2, shift)):
        for traced in visit.axes(index):
            place = traced.axis + offset
            if not block and (place < addressed or (index == 2 and traced.axis < len(indices) - 1)):
                raise _by_position(visit)
            here = traced.at(place)
            found[place] = visit.meet((0, found[place]), (index, here)) if place in found else here
    for index, offset in ((0, 0), (2, shift)):
        axes = tuple(traced.at(place - offset) for place, traced in sorted(found.items()))
        if visit.kind(index) is not ValueKind.TOKEN:
            visit.demand(index, axes)
        elif len(visit.axes(index)) != len(axes):
            raise visit.untraceable(index)
    return [tuple(found[place] for place in sorted(found))]


def _addresses_block(visit: NodeVisit, addressed: int) -> bool:
    """Whether the indices name every token in order, as where some features of all tokens are written."""
    indices = visit.node.inputs[1]
    whole = {traced.axis for index in (0, 2) for traced in visit.axes(index) if traced.axis < addressed}
    if indices is None or not whole or not follows_query_length(visit.flow, indices):
        return False
    if not all(dim.is_equal(visit.shape(1)[place], visit.shape(0)[place]) for place in whole):
        return False
    batch = {place for place in range(addressed) if visit.flow.batch in (visit.shape(1)[place],)}
    if not addresses_block(visit.flow, indices, whole | batch):
        return False
    visit.flow.addresses.add((visit.node, 1))
    return True


RULES: dict[str, Callable[[NodeVisit, AxisLinks], list[Axes]]] = {
    "rows": gather, "elements": gather_elements, "nd": gather_nd, "scatter_nd": scatter_nd,
}  # fmt: skip
