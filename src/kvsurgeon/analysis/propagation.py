"""Follow the tokens through a graph: every operator on token data must keep them apart, except attention.

This is the proof that every other operator is position-wise: it is made of axes and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from kvsurgeon.analysis import axis_rules, elementwise_rules, gather_rules, layout_rules, learned_rows, product_rules
from kvsurgeon.analysis.routed_regions import (
    PICKERS,
    RoutedRegion,
    begins_sorted,
    find_routed_region,
    joined,
    record_routed_region,
)
from kvsurgeon.analysis.sequence_state import find_sequence_state, record_sequence_state
from kvsurgeon.analysis.token_flow import NodeVisit, TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import STANDARD_DOMAINS, Shapes, in_one_line
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.graph.query import all_inputs
from kvsurgeon.ops import elementwise as elementwise_shapes
from kvsurgeon.ops.contraction import PRODUCTS
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import NOTHING
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

Rule = Callable[[NodeVisit], list[Axes]]

RULES: dict[str, Rule] = {
    **dict.fromkeys(elementwise_shapes.BINARY, elementwise_rules.broadcast),
    **dict.fromkeys(elementwise_shapes.UNARY - {"Trilu"}, elementwise_rules.keep),
    **dict.fromkeys(("BiasGelu", "FastGelu", "SwiGLU", "GatedAdd"), elementwise_rules.broadcast),
    "CastLike": elementwise_rules.keep,
    "BatchNormalization": elementwise_rules.keep,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "QLinearSoftmax"), axis_rules.softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
                     "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "GatedRMSNorm",
                     "BranchwiseRMSNorm"), axis_rules.normalization),
    "LpNormalization": axis_rules.lp_normalization,
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), axis_rules.by_channel),
    **{f"Reduce{kind}": axis_rules.reduce for kind in
       ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
    "ArgMax": axis_rules.arg_extreme,
    "ArgMin": axis_rules.arg_extreme,
    "TopK": axis_rules.top_k,
    **dict.fromkeys(("CumSum", "CumProd"), axis_rules.cumulative_sum),
    "Concat": axis_rules.concat,
    "QLinearConcat": axis_rules.concat,
    "Pad": axis_rules.pad,
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "QLinearConv"), axis_rules.convolution),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool", "QLinearAveragePool"), axis_rules.pool),
    **dict.fromkeys(("RotaryEmbedding", "MRotaryEmbedding"), axis_rules.rotary),
    **dict.fromkeys(("MoE", "QMoE"), axis_rules.experts),
    "DynamicQuantizeLinear": axis_rules.dynamic_quantize,
    "Reshape": layout_rules.reshape,
    "Flatten": layout_rules.flatten,
    "Unsqueeze": layout_rules.unsqueeze,
    "Squeeze": layout_rules.unsqueeze,
    "Transpose": layout_rules.transpose,
    "Expand": layout_rules.expand,
    "Trilu": layout_rules.trilu,
    "Tile": layout_rules.tile,
    "Split": layout_rules.split,
    "Slice": layout_rules.slice_,
    "Gather": gather_rules.gather,
    "GatherBlockQuantized": gather_rules.gather,
    "GatherElements": gather_rules.gather_elements,
    "ScatterElements": gather_rules.gather_elements,
    "GatherND": gather_rules.gather_nd,
    "ScatterND": gather_rules.scatter_nd,
    "OneHot": layout_rules.one_hot,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), axis_rules.global_pool),
    **dict.fromkeys(PRODUCTS, product_rules.product),
    "Attention": product_rules.attention,
}  # fmt: skip

_PLAINER = "start from the graph before an optimiser made this operator, or write it in others"
KNOWN_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")


def follow_tokens(
    nodes: Sequence[ir.Node],
    inputs: list[InputRole],
    shapes: Shapes,
    kinds: dict[ir.Value, ValueKind],
    length: Dimension,
    opsets: Mapping[str, int],
) -> TokenFlow:
    """Return where the tokens lie in every tensor that holds them, and what context meets them.

    Raises:
        UnsupportedError: An operator mixes tokens, has no rule, or loses sight of them.
    """
    order = {node: place for place, node in enumerate(nodes)}
    flow = TokenFlow(
        shapes=shapes, kinds=kinds, length=length, batch=_batch(inputs), order=order, inputs=inputs, opsets=opsets
    )
    for given in inputs:
        if given.is_token:
            flow.axes[given.value] = tuple(SequenceAxis(axis, flow.stream) for axis in given.lengths)
    routed_regions: dict[ir.Node, RoutedRegion] = {}
    read = _read_for_their_numbers(nodes)
    for node in nodes:
        if node.op_type in PICKERS and kinds.get(node.outputs[0]) is ValueKind.TOKEN and node not in routed_regions:
            found = find_routed_region(flow, node)
            routed_regions.update(dict.fromkeys(found.nodes, found) if found is not None else {})
        if node in routed_regions:
            if node is routed_regions[node].nodes[-1]:
                record_routed_region(flow, routed_regions[node])
        elif node not in flow.recalling and any(kinds.get(value) is ValueKind.TOKEN for value in node.outputs):
            try:
                _take_or_recall(flow, node, is_read=node in read)
            except UnsupportedError:
                if not _lands(flow, node, routed_regions):
                    raise
    _check_roles(flow)
    return flow


def _lands(flow: TokenFlow, node: ir.Node, routed_regions: dict[ir.Node, RoutedRegion]) -> bool:
    """Whether an island begins at a node that sorts the tokens or counts them; it is added to the others."""
    found = find_routed_region(flow, node) if begins_sorted(flow, node) else None
    if found is None:
        return False
    whole = joined({found, *(routed_regions[one] for one in found.nodes if one in routed_regions)}, flow.order)
    if whole is not None:
        routed_regions.update(dict.fromkeys(whole.nodes, whole))
    return whole is not None


def _read_for_their_numbers(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """The nodes of whose results more is read than the shape."""
    read: set[ir.Value] = {value for node in nodes for value in node.outputs if value.is_graph_output()}
    found: set[ir.Node] = set()
    for node in reversed(nodes):
        if any(value in read for value in node.outputs):
            found.add(node)
            read.update(() if node.op_type in SHAPE_ONLY else all_inputs(node))
    return found


def _reads_stream(flow: TokenFlow, node: ir.Node) -> bool:
    """Whether a node reads no tensor in which queries meet keys."""
    axes = [axis for value in node.inputs if value is not None for axis in flow.axes.get(value, ())]
    return all(axis.role.resolved() is Length.NEW for axis in axes)


def _batch(inputs: list[InputRole]) -> Dimension:
    """The batch of the token inputs: the axis before the tokens' one."""
    first = next(given for given in inputs if given.is_token)
    axis = next(iter(first.lengths))
    return first.dimensions[axis - 1] if axis else 1


def _take_or_recall(flow: TokenFlow, node: ir.Node, *, is_read: bool) -> None:
    """Follow tokens through a node; where it mixes them, remember what it reads if only earlier ones count.

    Where it puts rows of the model's own beside them, they are keys or values from there on.
    """
    try:
        _take(flow, node, RULES)
    except UnsupportedError:
        recall = find_sequence_state(flow, node) if is_read else None
        if recall is not None:
            record_sequence_state(flow, recall)
        elif (is_read or not _reads_stream(flow, node)) and not _borders(flow, node):
            raise


def _borders(flow: TokenFlow, node: ir.Node) -> bool:
    """Whether a node puts rows of the model's own beside the tokens; where they are then is noted."""
    if node.op_type not in learned_rows.RULES:
        return False
    try:
        _take(flow, node, learned_rows.RULES)
    except UnsupportedError:
        return False
    return True


def _take(flow: TokenFlow, node: ir.Node, rules: Mapping[str, Rule]) -> None:
    results = tuple(flow.shapes.facts.get(value, NOTHING) for value in node.outputs)
    step = NodeVisit(flow, flow.shapes.call(node), results)
    rule = rules.get(node.op_type) if node.domain in KNOWN_DOMAINS else None
    if rule is None:
        raise _no_rule(step)
    with in_one_line(node):
        found = rule(step)
        for value, fact, axes in zip(node.outputs, results, found, strict=False):
            if fact.shape is not None:
                _check_lengths(step, fact.shape, axes)
            flow.axes[value] = axes
    if any(value in flow.last for value in node.inputs if value is not None):
        _check_last(step, found)


def _no_rule(step: NodeVisit) -> UnsupportedError:
    node = step.node
    if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return step.refusal("token data goes through control flow, where its tokens cannot be followed")
    if node.domain not in KNOWN_DOMAINS:
        return UnsupportedError(
            f"custom operator {node.domain}::{node.op_type} works on token data, and nothing is known about it",
            at=node.outputs[0].name, expected="standard operators", found=node.domain,
        )  # fmt: skip
    if node.op_type in ("LSTM", "GRU", "RNN", "Scan"):
        return step.mixing()
    return step.refusal("there is no rule that says whether it keeps tokens apart", hint=_PLAINER)


def _check_lengths(step: NodeVisit, shape: tuple[Dimension, ...], axes: Axes) -> None:
    held = {axis.axis for axis in axes}
    for place, size in enumerate(shape):
        if place not in held and step.holds_length(size):
            raise step.refusal("a tensor's tokens were lost sight of", found=f"axis {place} of size {size}")
    for axis in axes:
        whole = axis.size(step.flow.length)
        if axis.role.resolved() is Length.NEW and not dim.is_equal(whole, shape[axis.axis]):
            raise step.refusal(
                "it keeps some of the tokens only", expected=f"axis {axis.axis} of size {whole}",
                found=str(shape[axis.axis]),
            )  # fmt: skip


def _check_last(step: NodeVisit, found: list[Axes]) -> None:
    """What is made of the last token alone must not reach the others."""
    if any(found):
        raise step.refusal("what is made of the last token is given to all of them")
    step.flow.last.update(step.node.outputs)


def _check_roles(flow: TokenFlow) -> None:
    for place in flow.beside:
        if flow.operands[place].resolved() is None:
            flow.operands[place].root().length = Length.NEW  # nothing made them keys
    for score in flow.scores:
        for role in (score.left_role.root(), score.right_role.root()):
            if role.length is None:
                raise UnsupportedError(
                    "two sequence axes meet, but neither is summed against values",
                    at=score.node.outputs[0].name, expected="weights @ values, as in attention",
                )  # fmt: skip
        if score.left_role.resolved() is score.right_role.resolved():
            raise UnsupportedError("queries and keys cannot be told apart", at=score.node.outputs[0].name)
    for place, role in flow.operands.items():
        mixes = role.resolved() is Length.NEW and role.root().only_if_total
        if mixes or (place in flow.bordered and role.resolved() is None):
            raise UnsupportedError(
                "an operator mixes tokens along the axis of the queries, which no KV cache can carry",
                at=role.root().only_if_total[0],
            )
