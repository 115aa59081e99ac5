"""Token ranges: the tokens that an element of a region's result depends on, by the axis links of its nodes alone.

A reduction over the sequence, whatever it computes, depends on all tokens; a convolution depends on a window, and pads,
slices and concatenations move the window. Links decide for most regions whether a result depends on a later token; only
the others are run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import NodeVisit, Place, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.query import is_operator
from kvsurgeon.ops.operator import AxisLinks, Label, UntraceableAxesError
from kvsurgeon.ops.table import axis_links
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable, SequenceAxis, reshape_axes


@dataclass(frozen=True, slots=True)
class TokenRange:
    """The tokens that each element along an axis depends on.

    Attributes:
        axis: Index of the axis; None if every element depends on the same tokens: on all, or on none.
        first: Offset of the first token from the element; -inf for the start of the text.
        last: Offset of the last token from the element; inf for the end of the text.
        reads_context: Whether an element also depends on context, which may depend on the total length.
    """

    axis: int | None
    first: float = 0
    last: float = 0
    reads_context: bool = False

    @property
    def is_causal(self) -> bool:
        """Whether no element depends on a later token."""
        return self.last <= 0

    def moved(self, first: float, last: float) -> TokenRange:
        """Return the range of elements that depend on the elements from one offset to another."""
        return replace(self, first=self.first + first, last=self.last + last)


ALL_TOKENS = TokenRange(None, -math.inf, math.inf)
NO_TOKENS = TokenRange(None)  # of a range of dynamic quantization, which is assumed to be the same in every call
Ranges = Mapping[int, TokenRange]  # index of an input of a node -> its range


def token_range(flow: TokenFlow, nodes: Sequence[ir.Node], places: Sequence[Place]) -> TokenRange | None:
    """Return the tokens that the first output of the last node depends on; None if links do not decide.

    Args:
        flow: The token flow.
        nodes: The nodes of a region, in execution order.
        places: Inputs of the nodes that are computed outside the region; each has one plain sequence axis.
    """
    known: dict[ir.Value, TokenRange | None] = {}
    for node, index in places:
        value = node.inputs[index]
        assert value is not None
        known[value] = TokenRange(flow.axes[value][0].axis)
    for node in nodes:
        visit = NodeVisit(flow, flow.shapes.call(node))
        try:
            found = _range_after(visit, known)
        except (UnsupportedError, UntraceableAxesError):  # a rank is unknown, or the links of the node
            found = None
        further = NO_TOKENS if found is not None and is_operator(node, "DynamicQuantizeLinear") else None
        known |= dict.fromkeys(node.outputs[1:], ALL_TOKENS if found is ALL_TOKENS else further)
        known[node.outputs[0]] = found
    return known[nodes[-1].outputs[0]]


def _range_after(visit: NodeVisit, known: Mapping[ir.Value, TokenRange | None]) -> TokenRange | None:
    """Return the range of a node's first output."""
    found = {index: known[visit.node.inputs[index]] for index in visit.tokens}  # type: ignore[index]
    if any(one is ALL_TOKENS for one in found.values()):
        return ALL_TOKENS
    if found and all(one is NO_TOKENS for one in found.values()):
        return NO_TOKENS
    found = {index: one for index, one in found.items() if one is not NO_TOKENS}
    links = axis_links(visit.call)
    if links is None or links.attention is not None or (links.dynamic_range and len(links.outputs) == 1):
        return None
    ranges = {index: one for index, one in found.items() if one is not None}
    if not ranges or len(ranges) < len(found):  # context has no range
        return None
    return _reshaped(visit, ranges.get(0)) if links.row_major else _along_one_label(visit, links, ranges)


def _along_one_label(visit: NodeVisit, links: AxisLinks, ranges: Mapping[int, TokenRange]) -> TokenRange | None:
    """Return the range of a node's first output, if the axes of its tokens have one label."""
    labels = {_label(links, index, one) for index, one in ranges.items()}
    label = labels.pop()
    if labels or label is None or links.token_rows or _brings_tokens(visit, links, label):
        return None
    if label in (links.summed or ()) or (label in links.mixed and not _keeps_order(links, label)):
        return ALL_TOKENS
    if label not in links.outputs[0]:
        return None
    moved = [_moved(visit, links, label, index, one) for index, one in ranges.items()]
    if not all(moved):
        return None
    result = TokenRange(
        axis=links.outputs[0].index(label),
        first=min(one.first for one in moved if one is not None),
        last=max(one.last for one in moved if one is not None),
        reads_context=_reads_context(visit, links) or any(one.reads_context for one in ranges.values()),
    )
    return result if _is_only_sequence(visit, result) else None


def _label(links: AxisLinks, index: int, found: TokenRange) -> Label | None:
    labels = links.inputs[index]
    return None if labels is None or found.axis is None else labels[found.axis]


def _keeps_order(links: AxisLinks, label: Label) -> bool:
    """Return whether it is known which elements influence which along a label that is mixed."""
    return label in links.windows or label in links.padded or links.addressing is not None


def _moved(visit: NodeVisit, links: AxisLinks, label: Label, index: int, found: TokenRange) -> TokenRange | None:
    """Return the range of the elements of the result that are computed from one input; None if it is unknown."""
    size, after = visit.shape(index)[found.axis or 0], visit.result_shape()[links.outputs[0].index(label)]
    if size == 1 and after != 1 and label not in {*links.windows, *links.padded, links.joined}:
        return replace(found, first=-math.inf)  # one token for all: none of them is earlier than the first
    offsets = _offsets(visit, links, label, index, found)
    if offsets is None or not _keeps_end(visit, found, offsets[1], (size, after)):
        return None
    return found.moved(*offsets)


def _offsets(
    visit: NodeVisit, links: AxisLinks, label: Label, index: int, found: TokenRange
) -> tuple[float, float] | None:
    """Return the offsets of the first and the last element of an input that an element depends on."""
    if label in links.windows:
        return links.windows[label]
    if label in links.blocked or (label in links.repeated and links.repeated[label] != 1):
        return None
    if links.addressing is not None and label in links.mixed:
        return None
    shift: Dimension = 0
    if label in links.padded:
        shift = dim.multiply(-1, links.padded[label][0])
    elif label in links.selected:
        start, _, step = links.selected[label]
        shift = start if step == 1 and isinstance(start, int) and start >= 0 else dim.unknown("a step")
    elif label == links.joined:
        before = [visit.shape(other)[found.axis or 0] for other in range(index) if links.inputs[other] is not None]
        shift = dim.multiply(-1, sum(before))
    return (shift, shift) if isinstance(shift, int) else None


def _keeps_end(visit: NodeVisit, found: TokenRange, last: float, sizes: tuple[Dimension, Dimension]) -> bool:
    """Return whether no element that is added at the end stands for a token of the text.

    The result of such a token would change with the next one. An infinite offset reads what there is.
    """
    size, after = sizes
    if not math.isfinite(last) or not math.isfinite(found.last):
        return True
    if isinstance(size, int) and not isinstance(visit.flow.length, int):
        return True  # the same in every text
    added = dim.subtract(dim.add(after, int(last)), size)
    if isinstance(added, int) and added <= 0:
        return True
    missing = dim.subtract(visit.flow.length, size)
    return isinstance(missing, int) and missing <= found.last


def _reshaped(visit: NodeVisit, found: TokenRange | None) -> TokenRange | None:
    if found is None or found.axis is None or visit.tokens != (0,):
        return None
    before = visit.shape(0)
    axis = SequenceAxis(found.axis, LengthVariable(Length.NEW))
    axes = reshape_axes((axis,), before, visit.result_shape(), before[found.axis])
    result = replace(found, axis=axes[0].axis) if axes and axes[0].is_plain else None
    return result if result is not None and _is_only_sequence(visit, result) else None


def _brings_tokens(visit: NodeVisit, links: AxisLinks, label: Label) -> bool:
    """Return whether an input has an axis of the sequence length that is not the one of the tokens."""
    return any(
        visit.holds_length(size) and other != label
        for index, labels in enumerate(links.inputs)
        if labels is not None and visit.node.inputs[index] is not None
        for other, size in zip(labels, visit.shape(index), strict=True)
    )


def _reads_context(visit: NodeVisit, links: AxisLinks) -> bool:
    """Return whether the elements of the result depend on context, and not only their number."""
    bounds = {links.target, *(index for index, _ in links.length_inputs)}
    return any(
        kind is ValueKind.CONTEXT and (index not in bounds or visit.call.numbers(index) is None)
        for index, kind in enumerate(visit.kinds)
    )


def _is_only_sequence(visit: NodeVisit, found: TokenRange) -> bool:
    """Return whether no other axis of the result has the sequence length."""
    return not any(visit.holds_length(size) for place, size in enumerate(visit.result_shape()) if place != found.axis)
