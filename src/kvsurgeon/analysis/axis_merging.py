"""The sequence axes of several inputs, label by label: tokens are aligned with tokens, and context with tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvsurgeon.analysis.token_flow import NodeVisit, is_of_queries
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import Code
from kvsurgeon.ops.operator import Label, Labels
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis

AxesByLabel = dict[Label, SequenceAxis]  # label -> the sequence axis of that label


def merge(visit: NodeVisit, inputs: Sequence[Labels | None], *, unaligned: Label | None = None) -> AxesByLabel:
    """Return the sequence axis of each label of the result; context is aligned with it.

    Args:
        visit: The node.
        inputs: Labels of the inputs.
        unaligned: A label along which input 0 is addressed by others, and so need not be aligned.
    """
    traced: AxesByLabel = {}
    owner: dict[Label, int] = {}
    tokens = linked_tokens(visit, inputs)
    for index in sorted(tokens, key=lambda index: is_of_queries(visit.axes(index))):
        for axis in visit.axes(index):
            label = (inputs[index] or ())[axis.axis]
            if label is None:
                raise visit.mixing()
            if index == 0 and label == unaligned:
                continue
            if label in traced:
                traced[label] = visit.meet((owner[label], traced[label]), (index, axis))
            else:
                traced[label], owner[label] = axis, index
    _cross(visit, traced, owner, tokens)
    if len([labels for labels in inputs if labels is not None]) > 1:
        _bring(visit, inputs, traced)
    for index, labels in enumerate(inputs):
        if labels is not None and visit.node.inputs[index] is not None:
            align(visit, index, labels, traced, unaligned if index == 0 else None)
    return traced


def _cross(visit: NodeVisit, traced: AxesByLabel, owner: dict[Label, int], tokens: Sequence[int]) -> None:
    """Two axes of the new length side by side: queries and keys meet, element by element."""
    if len(traced) < 2:
        return
    query_axis = [label for label, axis in traced.items() if axis.variable.resolved() is Length.NEW]
    if len(query_axis) < 2:
        return
    first, second, *more = sorted(query_axis, key=str)
    if more or owner[first] == owner[second] or len(tokens) != 2:
        raise visit.mixing()
    variables = visit.scores(owner[first], owner[second])
    for label, variable in zip((first, second), variables, strict=True):
        visit.flow.operands[visit.node, owner[label]] = variable
        traced[label] = traced[label].with_variable(variable)


def placed(traced: Mapping[Label, SequenceAxis], labels: Labels) -> Axes:
    """Return the sequence axes of an output with these labels."""
    return tuple(traced[label].at(axis) for axis, label in enumerate(labels) if label is not None and label in traced)


def linked_tokens(visit: NodeVisit, inputs: Sequence[Labels | None]) -> list[int]:
    """Return the inputs that are token data and have labels."""
    return [index for index in visit.tokens if inputs[index] is not None]


def _bring(visit: NodeVisit, inputs: Sequence[Labels | None], traced: AxesByLabel) -> None:
    """Context may bring an axis of the sequence length: tokens that it meets may then be queries, or keys."""
    before = dict(traced)
    for index, labels in enumerate(inputs):
        if labels is None or visit.kind(index) is ValueKind.TOKEN:
            continue
        for label, size in zip(labels, visit.shape(index), strict=True):
            if label is not None and label not in traced and visit.holds_length(size):
                traced[label] = brought(visit, size)
    if len(before) == len(traced):
        return
    for label, axis in before.items():
        if axis.variable.resolved() is not Length.NEW:
            continue
        variable = LengthVariable(at=visit.node.outputs[0].name or "")
        for index in linked_tokens(visit, inputs):
            labels = inputs[index] or ()
            if label in {labels[one.axis] for one in visit.axes(index)}:
                traced[label] = visit.open_length(axis, index, variable)


RELATIVE_SHIFT = (
    "scores for all distances are followed only if they are shifted to keys as in Transformer-XL: "
    "gather relative positions for each query and key before the product"
)


def brought(visit: NodeVisit, size: Dimension) -> SequenceAxis:
    """Return an axis of the sequence length that context brings to token data, such as relative positions."""
    if size is not visit.flow.length:
        raise visit.refusal("context brings an axis of another length", found=str(size), hint=RELATIVE_SHIFT)
    return SequenceAxis(0, LengthVariable(at=visit.node.outputs[0].name or "", bias=True))


def align(
    visit: NodeVisit, index: int, labels: Labels, traced: Mapping[Label, SequenceAxis], unaligned: Label | None
) -> None:
    """Demand of an input what the sequence axes of the result ask of it."""
    token = visit.kind(index) is ValueKind.TOKEN
    own = {axis.axis for axis in visit.axes(index)} if token else set()
    wanted: list[SequenceAxis] = []
    for place, (label, size) in enumerate(zip(labels, visit.shape(index), strict=True)):
        if place in own or (label is not None and label == unaligned):
            continue
        if label is not None and label in traced:
            if size == 1:
                continue
            if token:
                raise visit.untraceable(index)
            _check_size(visit, index, traced[label], size)
            wanted.append(traced[label].at(place))
        elif visit.holds_length(size):
            raise visit.untraceable(index)
    if not token:
        visit.demand(index, tuple(wanted))


def _check_size(visit: NodeVisit, index: int, axis: SequenceAxis, size: Dimension) -> None:
    """Context is cut to the new length only if it surely has the sequence length."""
    if axis.variable.resolved() is Length.NEW and not dim.is_equal(size, axis.size(visit.flow.length)):
        raise visit.refusal(
            "context that meets the tokens does not surely have their length", at=visit.node.inputs[index],
            expected=str(axis.size(visit.flow.length)), found=str(size), code=Code.UNTRACEABLE_SEQUENCE,
            hint=visit.fixed_length_hint(size),
        )  # fmt: skip
