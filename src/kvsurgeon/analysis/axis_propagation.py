"""Sequence axes through one node, by how its operator links axes: one engine for all operators.

Every operator on token data must treat tokens position by position, except attention: that is proved here, by axes and
shapes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from kvsurgeon.analysis import lookups, products, sequence_slices
from kvsurgeon.analysis.axis_merging import RELATIVE_SHIFT, brought, linked_tokens, merge, placed
from kvsurgeon.analysis.token_flow import PER_CALL, NodeVisit, is_of_queries
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code
from kvsurgeon.ops.operator import AxisLinks, Label, broadcast_links
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis, reshape_axes


def axes_after(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """Return the sequence axes of a node's outputs.

    Raises:
        UnsupportedError: The node mixes tokens, or their axis cannot be traced through it.
    """
    _check_parameters(visit, links)
    if links.attention is not None:
        return products.attention(visit, links)
    if links.token_rows:
        return _token_rows(visit)
    if links.diagonal is not None:
        _check_triangle(visit, links.diagonal)
    if links.row_major:
        return _reshaped(visit, links)
    if links.addressing is not None:
        return lookups.RULES[links.addressing](visit, links)
    if links.summed is not None:
        return products.product(visit, links)
    if links.target is not None:
        return _expanded(visit, links)
    if links.joined is not None:
        return sequence_slices.concatenated(visit, links)
    if not linked_tokens(visit, links.inputs):
        links = broadcast_links(visit.call)  # only a scale or another parameter is token data
    return _broadcast(visit, links)


def _check_parameters(visit: NodeVisit, links: AxisLinks) -> None:
    for index in links.constant_inputs:
        if visit.kind(index) is not ValueKind.CONSTANT:
            raise visit.mixing()
    if links.dynamic_range:
        visit.assume(PER_CALL)
        if len(links.outputs) > 1:
            visit.flow.per_call.update(visit.node.outputs)


def _broadcast(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """Inputs that are broadcast against each other, or one input: tokens meet tokens of the same position."""
    _check_mixed(visit, links)
    _check_sequence(visit, links)
    traced = merge(visit, links.inputs)
    if links.padded or links.repeated or links.ranked or links.length_inputs:
        traced = {label: _resized(visit, links, label, axis) for label, axis in traced.items()}
    cut = sequence_slices.selected(visit, links, traced) if links.selected else traced
    return [placed(cut, labels) for labels in links.outputs]


def _check_mixed(visit: NodeVisit, links: AxisLinks) -> None:
    """An operator may mix along the axis of the keys."""
    if not links.mixed and not links.blocked:
        return
    for index in visit.tokens:
        labels = links.inputs[index]
        if labels is None:
            continue
        for axis in visit.axes(index):
            label = labels[axis.axis]
            if label is not None and label in links.blocked:
                reason = links.blocked[label]
                raise visit.mixing() if reason is None else visit.refusal(reason, code=Code.UNTRACEABLE_SEQUENCE)
            if label in links.mixed:
                _check_filled(visit, links.padded.get(label, ()), axis)
                visit.mix_along(axis)


def _check_filled(visit: NodeVisit, rows: Sequence[Dimension], axis: SequenceAxis) -> None:
    """Check that the rows added to a text do not depend on its length, as those that fill up a chunk do."""
    added = next((number for number in rows if not isinstance(number, int)), None)
    if added is not None and axis.variable.resolved() is Length.NEW:
        raise visit.refusal(
            "the rows that it adds to a text depend on its length, as those that fill up a chunk", found=str(added),
            expected="a fixed number of rows", code=Code.MIXES_TOKENS,
            hint="no recurrence over chunks is recognized; one may be in an export of a fixed length",
        )  # fmt: skip


def check_batch(visit: NodeVisit, links: AxisLinks) -> None:
    """Check that a node keeps the sequences of a batch apart, and in their order.

    Raises:
        UnsupportedError: It mixes, moves or selects sequences.
    """
    if links.token_rows:
        return  # one result for each row, whichever sequence it is of
    after = visit.batch_axes(visit.call.result)
    before = {index: visit.batch_axes(visit.call.fact(index)) for index in visit.tokens}
    places = [(index, place) for index, found in before.items() for place in found]
    if (
        len(after) > max([1, *map(len, before.values())])
        or any(_mixes_batch(visit, links, index, place) for index, place in places)
        or not _keeps_batch_layout(visit, links, places)
    ):
        raise visit.refusal(
            "it mixes the sequences of a batch: padding in one would reach others", code=Code.BATCH_LEAK
        )


def _keeps_batch_layout(visit: NodeVisit, links: AxisLinks, places: Sequence[tuple[int, int]]) -> bool:
    """Return whether the batch is where the inputs have it, and record its layout on an axis that holds more."""
    found: set[SequenceAxis] = set()
    for index, place in places:
        value = visit.node.inputs[index]
        layout = None if value is None else visit.flow.batch_layouts.get(value)
        if visit.shape(index)[place] is BATCH:
            layout = SequenceAxis(place, visit.flow.batch_variable)
        if layout is None or layout.axis != place:
            continue
        labels, after = links.inputs[index], visit.call.result.shape
        if links.row_major and index == 0 and after is not None:
            moved = reshape_axes((layout,), visit.shape(index), after, BATCH)
            if moved is None:
                return False
            found |= set(moved)
        elif labels is not None and labels[place] is not None and labels[place] in links.outputs[0]:
            found.add(layout.at(links.outputs[0].index(labels[place])))
    if len(found) == 1 and not (axis := found.pop()).is_plain:
        visit.flow.batch_layouts |= dict.fromkeys(visit.node.outputs, axis)
        return True
    return not found or len({(axis.outer, axis.inner) for axis in found}) == 1


def _mixes_batch(visit: NodeVisit, links: AxisLinks, index: int, place: int) -> bool:
    """Return whether an element along a batch axis depends on another element along it, or becomes another one."""
    before, after, labels = visit.shape(index), visit.call.result.shape, links.inputs[index]
    if labels is None:
        return False
    label = labels[place]
    if label is None:
        in_order = (visit.node, 1) in visit.flow.addresses
        return index == 0 and (links.addressing == "nd" or (links.addressing == "scatter_nd" and not in_order))
    if label in links.selected:
        return links.selected[label][2] != 1 or not dim.is_equal(before[place], (after or before)[place])
    if links.addressing == "rows" and index == 0 and label not in links.outputs[0]:
        return True
    return label in links.mixed or label in links.blocked or label in (links.summed or ())


def _check_triangle(visit: NodeVisit, diagonal: tuple[Label, Label]) -> None:
    """A triangle is cut out of two axes without tokens, or of queries and keys, where the past moves its diagonal."""
    sides = {axis.axis: axis for axis in visit.axes(0) if axis.axis in diagonal}
    if not sides:
        return
    if len(sides) == 1 or not all(axis.is_plain for axis in sides.values()):
        raise visit.mixing()
    if visit.call.given(1) is not None and visit.call.numbers(1) is None:
        raise visit.refusal("its diagonal is unknown")
    rows, columns = (sides[axis].variable for axis in sorted(sides))
    visit.flow.diagonals[visit.node] = rows, columns


def _check_sequence(visit: NodeVisit, links: AxisLinks) -> None:
    """An operator that takes an axis as the sequence must find the tokens there, and nothing else."""
    if links.sequence is None:
        return
    axes, labels = visit.axes(0), links.inputs[0] or ()
    found = next((axis for axis in axes if labels[axis.axis] == links.sequence), None)
    if found is None or not found.is_plain or len(axes) > 1:
        raise visit.refusal("its input does not have the sequence axis where the operator expects it")


def _resized(visit: NodeVisit, links: AxisLinks, label: Label, axis: SequenceAxis) -> SequenceAxis:
    """The axis with what the operator adds or repeats along it."""
    if label in links.padded:
        axis = axis.with_rows(*links.padded[label])
    if label in links.ranked:
        axis = axis._replace(most=links.ranked[label])
    times = links.repeated.get(label, 1)
    if any(visit.holds_length(one) for one in links.repeated.values()):
        raise visit.refusal("it repeats token data as often as there are tokens", code=Code.UNTRACEABLE_SEQUENCE)
    if times != 1:
        axis = axis._replace(outer=dim.multiply(times, axis.outer))
    for index, one in links.length_inputs:
        if one == label and not links.selected:
            visit.parameter((index,), axis.variable)
    return axis


def _reshaped(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """Row-major order gives the sequence axis of the result."""
    if visit.kind(0) is not ValueKind.TOKEN:
        raise visit.refusal("its target depends on the tokens", code=Code.UNTRACEABLE_SEQUENCE)
    if links.target is not None:
        visit.flow.targets[visit.node] = links.target
    before, after = visit.shape(0), visit.result_shape()
    axes = reshape_axes(visit.axes(0), before, after, visit.flow.length)
    tokens = _tokens_of_result(visit, before, after)
    if axes is None and tokens is not None:
        raise visit.refusal(
            f"its target is a constant for {tokens} tokens", code=Code.FIXED_LENGTH,
            expected=f"a target for the length `{visit.flow.length}`", found=f"{_text(before)} -> {_text(after)}",
            hint=visit.fixed_length_hint(tokens),
        )  # fmt: skip
    if axes is None:
        raise visit.refusal(
            "the sequence axis is split, or cannot be found in the result", code=Code.UNTRACEABLE_SEQUENCE,
            expected="an axis of size batch * length * heads or the like", found=f"{_text(before)} -> {_text(after)}",
            hint=RELATIVE_SHIFT if any(_is_of_pairs(size) for size in after) else None,
        )  # fmt: skip
    return [axes]


def _tokens_of_result(visit: NodeVisit, before: tuple[Dimension, ...], after: tuple[Dimension, ...]) -> int | None:
    """Return the number of tokens for which the shape of a result is written, if it is not the length."""
    tokens = dim.exact_quotient(dim.multiply(dim.product(after), visit.flow.length), dim.product(before))
    place = next((axis.axis for axis in visit.axes(0) if axis.is_plain), len(after))
    if not isinstance(tokens, int) and place < len(after):
        tokens = after[place]  # the batch is a number too
    return tokens if isinstance(tokens, int) and tokens != visit.flow.length else None


def _is_of_pairs(size: Dimension) -> bool:
    """Return whether an axis has an element for each pair of tokens."""
    return not isinstance(size, int) and LENGTH**2 in size.atoms(sympy.Pow)


def _text(shape: tuple[Dimension, ...]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _expanded(visit: NodeVisit, links: AxisLinks) -> list[Axes]:
    """A broadcast to a shape; an axis of the sequence length that it adds faces queries, or keys."""
    assert links.target is not None
    if visit.kind(0) is not ValueKind.TOKEN:
        raise visit.refusal("its target depends on the tokens", code=Code.UNTRACEABLE_SEQUENCE)
    after, labels = visit.result_shape(), links.inputs[0] or ()
    traced = {axis.axis + len(after) - len(labels): axis for axis in visit.axes(0)}
    new = [place for place, size in enumerate(after) if place not in traced and visit.holds_length(size)]
    if new:  # queries repeated along the keys, or keys along the queries
        traced = {
            label: visit.open_length(axis, 0) if axis.variable.resolved() is Length.NEW else axis
            for label, axis in traced.items()
        }
        traced |= {place: brought(visit, after[place]) for place in new}
    visit.flow.targets[visit.node] = links.target
    return [tuple(traced[place].at(place) for place in sorted(traced))]


def _token_rows(visit: NodeVisit) -> list[Axes]:
    """Each token apart, [tokens, features]: inputs may have batch and sequence on one axis or on two."""
    for index in visit.tokens:
        traced, shape = visit.axes(index), visit.shape(index)
        tokens = dim.product(shape[:-1])
        alone = len(traced) == 1 and traced[0].axis != len(shape) - 1 and traced[0].inner == 1
        if not alone or not dim.is_equal(tokens, dim.product(visit.shape(0)[:-1])) or not is_of_queries(traced):
            raise visit.refusal("its input does not hold a token in each row", at=visit.node.inputs[index])
    if any(visit.kind(index) is not ValueKind.TOKEN for index in (0, 1)):
        raise visit.refusal("the routing does not depend on the token", code=Code.UNSUPPORTED)
    return [visit.axes(0)]
