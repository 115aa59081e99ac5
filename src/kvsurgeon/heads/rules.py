"""Other heads in the result of an operator, from other heads in its inputs: one rule over the operator table.

The axis links say which axes of the inputs hold the heads. The rule returns None if heads cannot be followed through
the node alone, as through a `Split` that separates queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.node_edit import NodeEdit, NodeInputs
from kvsurgeon.heads.weights import packed_product, product
from kvsurgeon.ops.operator import AxisLinks, Label, Operator, Trait, UntraceableAxesError
from kvsurgeon.ops.table import axis_links, operator_of
from kvsurgeon.symbolic.dimension import Dimension


def inputs_with_heads(change: NodeEdit) -> NodeInputs | None:
    """Return the inputs of a node whose output has other heads; None if the node alone does not give them.

    Raises:
        UnsupportedError: The node mixes heads, or it is not known whether it does.
    """
    operator = operator_of(change.node)
    links = None if operator is None else _links(change)
    if operator is None or links is None or links.attention is not None or links.token_rows:
        raise change.refusal("cannot trace heads through it")
    if operator.notation is not None:
        packed = Trait.PACKED_WEIGHTS in operator.traits
        return packed_product(change) if packed else product(change, operator.column_parameters)
    if Trait.RESHAPE in operator.traits:
        return _reshaped(change, links)
    if links.addressing == "nd" or (Trait.SELECT in operator.traits and change.separates_projection):
        return None
    label = _label(change, operator, links)
    if label is None:
        return None
    if label in links.mixed or links.dynamic_range or label in (links.diagonal or ()):
        if not links.dynamic_range and Trait.NORMALIZATION not in operator.traits:
            raise change.refusal("it mixes all heads")
        change.check_even()
    return NodeInputs(
        inputs=[_input(change, operator, links, index, label) for index in range(len(change.node.inputs))],
        attributes=_attributes(change, links),
        replaced=tuple(index for index, one in enumerate(links.outputs) if links.dynamic_range and not one),
    )


def _links(change: NodeEdit) -> AxisLinks | None:
    try:
        return axis_links(change.call)
    except UntraceableAxesError as error:
        raise change.refusal(str(error)) from error


def _label(change: NodeEdit, operator: Operator, links: AxisLinks) -> Label | None:
    """The label of the head axis of the output; None if heads cannot be followed along it."""
    label = links.outputs[change.output][change.axis.axis]
    if label is None and Trait.REDUCTION in operator.traits:
        label = change.axis.axis  # a reduced axis that is kept
    changed = (links.joined, *links.padded, *links.selected, *links.blocked)
    if label is None or label in changed or links.repeated.get(label, 1) != 1:
        return None
    first = next((labels for labels in links.inputs if labels is not None), ())
    if links.addressing is not None and (label in links.mixed or label not in first):
        return None  # heads do not come from indices
    return label


def _input(change: NodeEdit, operator: Operator, links: AxisLinks, index: int, label: Label) -> ir.Value | None:
    labels, value = links.inputs[index], change.node.inputs[index]
    if index == links.target:
        return _expanded_target(change)
    if value is None or labels is None:
        blocks = Trait.QUANTIZATION in operator.traits and change.given(index) and len(change.shape(index)) > 1
        return change.propagated(index, _in_blocks(change, change.shape(0), change.shape(index))) if blocks else value
    if label not in labels:
        return change.without_heads(index) if links.addressing is None else value
    place = labels.index(label)
    broadcast = change.shape(index)[place] == 1 and (change.axis.size != 1 or not change.is_projected(index))
    return change.without_heads(index) if broadcast else change.propagated(index, change.axis.at(place))


def _in_blocks(change: NodeEdit, whole: Sequence[Dimension], blocks: Sequence[Dimension]) -> HeadAxis:
    """The head axis of scales that hold an element for each block along it."""
    axis = change.axis
    size, count = whole[axis.axis], blocks[axis.axis]
    if size == count:
        return axis
    assert isinstance(size, int)
    assert isinstance(count, int)
    width = -(-size // count)
    if size % count or not isinstance(axis.inner, int) or axis.inner % width:
        raise change.refusal(f"blocks of {width} that are quantized together span heads")
    return replace(axis, inner=axis.inner // width)


def _expanded_target(change: NodeEdit) -> ir.Value:
    after, before = change.scaled(change.result, change.axis), change.shape(0)
    shift = len(after) - len(before)
    kept = [at >= shift and before[at - shift] == change.result[at] for at in range(len(after))]
    return change.propagation.lengths.expand_target(after, kept)


def _reshaped(change: NodeEdit, links: AxisLinks) -> NodeInputs | None:
    """Row-major order gives the head axis of the input; its target is computed again."""
    before = change.axis.before_reshape(change.shape(0), change.result)
    if before is None or (before.axis == 0 and before.size == 1 and change.is_token(0)):
        return None  # a single head is not to be taken for a batch that is fixed to 1
    if links.target is None:
        return NodeInputs(inputs=[change.propagated(0, before), *change.inputs[1:]])
    after = change.scaled(change.result, change.axis)
    target = change.propagation.lengths.reshape_target(after, change.scaled(change.shape(0), before))
    return NodeInputs(inputs=[change.propagated(0, before), target], without=frozenset({"allowzero", "shape"}))


def _attributes(change: NodeEdit, links: AxisLinks) -> dict[str, int]:
    """Attributes that count the heads of an operator that takes them on the last axis."""
    counted = links.sequence is not None and len(change.result) == 3 and change.call.integer("num_heads", 0)
    return {"num_heads": change.selection.size} if counted else {}
