"""Follow the tokens through a graph: every operator on token data must keep them apart, except attention.

This is the proof that every other operator is position-wise: it is made of axes and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from kvsurgeon.errors import Refused
from kvsurgeon.graph.liveness import read_by
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.sequence import along, bordering, elementwise, moving, picking, products
from kvsurgeon.sequence.axes import Axes, Length, SequenceAxis
from kvsurgeon.sequence.flow import Flow, Step
from kvsurgeon.sequence.inputs import GivenInput
from kvsurgeon.sequence.islands import PICKERS, Island, begins_sorted, find_island, joined, take_island
from kvsurgeon.sequence.kinds import Kind
from kvsurgeon.sequence.recall import find_recall, take_recall
from kvsurgeon.shapes import dimension as dim
from kvsurgeon.shapes import elementwise as elementwise_shapes
from kvsurgeon.shapes.contraction import PRODUCTS
from kvsurgeon.shapes.dimension import Dimension
from kvsurgeon.shapes.fact import NOTHING
from kvsurgeon.shapes.inference import STANDARD_DOMAINS, Shapes, in_one_line

Rule = Callable[[Step], list[Axes]]

RULES: dict[str, Rule] = {
    **dict.fromkeys(elementwise_shapes.BINARY, elementwise.broadcast),
    **dict.fromkeys(elementwise_shapes.UNARY - {"Trilu"}, elementwise.keep),
    **dict.fromkeys(("BiasGelu", "FastGelu", "SwiGLU", "GatedAdd"), elementwise.broadcast),
    "CastLike": elementwise.keep,
    "BatchNormalization": elementwise.keep,
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "QLinearSoftmax"), along.softmax),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization",
                     "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "GatedRMSNorm",
                     "BranchwiseRMSNorm"), along.normalization),
    "LpNormalization": along.lp_normalization,
    **dict.fromkeys(("InstanceNormalization", "GroupNormalization"), along.by_channel),
    **{f"Reduce{kind}": along.reduce for kind in
       ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")},
    "ArgMax": along.arg_extreme,
    "ArgMin": along.arg_extreme,
    "TopK": along.top_k,
    **dict.fromkeys(("CumSum", "CumProd"), along.cumulative_sum),
    "Concat": along.concat,
    "QLinearConcat": along.concat,
    "Pad": along.pad,
    **dict.fromkeys(("Conv", "ConvInteger", "FusedConv", "QLinearConv"), along.convolution),
    **dict.fromkeys(("AveragePool", "MaxPool", "LpPool", "QLinearAveragePool"), along.pool),
    **dict.fromkeys(("RotaryEmbedding", "MRotaryEmbedding"), along.rotary),
    **dict.fromkeys(("MoE", "QMoE"), along.experts),
    "DynamicQuantizeLinear": along.dynamic_quantize,
    "Reshape": moving.reshape,
    "Flatten": moving.flatten,
    "Unsqueeze": moving.unsqueeze,
    "Squeeze": moving.unsqueeze,
    "Transpose": moving.transpose,
    "Expand": moving.expand,
    "Trilu": moving.trilu,
    "Tile": moving.tile,
    "Split": moving.split,
    "Slice": moving.slice_,
    "Gather": picking.gather,
    "GatherBlockQuantized": picking.gather,
    "GatherElements": picking.gather_elements,
    "ScatterElements": picking.gather_elements,
    "GatherND": picking.gather_nd,
    "ScatterND": picking.scatter_nd,
    "OneHot": moving.one_hot,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), along.global_pool),
    **dict.fromkeys(PRODUCTS, products.product),
    "Attention": products.attention,
}  # fmt: skip

_PLAINER = "start from the graph before an optimiser made this operator, or write it in others"
KNOWN_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")


def follow_tokens(
    nodes: Sequence[ir.Node],
    inputs: list[GivenInput],
    shapes: Shapes,
    kinds: dict[ir.Value, Kind],
    length: Dimension,
    opsets: Mapping[str, int],
) -> Flow:
    """Return where the tokens lie in every tensor that holds them, and what context meets them.

    Raises:
        Refused: An operator mixes tokens, has no rule, or loses sight of them.
    """
    order = {node: place for place, node in enumerate(nodes)}
    flow = Flow(
        shapes=shapes, kinds=kinds, length=length, batch=_batch(inputs), order=order, inputs=inputs, opsets=opsets
    )
    for given in inputs:
        if given.is_token:
            flow.axes[given.value] = tuple(SequenceAxis(axis, flow.stream) for axis in given.lengths)
    islands: dict[ir.Node, Island] = {}
    read = _read_for_their_numbers(nodes)
    for node in nodes:
        if node.op_type in PICKERS and kinds.get(node.outputs[0]) is Kind.TOKEN and node not in islands:
            found = find_island(flow, node)
            islands.update(dict.fromkeys(found.nodes, found) if found is not None else {})
        if node in islands:
            if node is islands[node].nodes[-1]:
                take_island(flow, islands[node])
        elif node not in flow.recalling and any(kinds.get(value) is Kind.TOKEN for value in node.outputs):
            try:
                _take_or_recall(flow, node, is_read=node in read)
            except Refused:
                if not _lands(flow, node, islands):
                    raise
    _check_roles(flow)
    return flow


def _lands(flow: Flow, node: ir.Node, islands: dict[ir.Node, Island]) -> bool:
    """Whether an island begins at a node that sorts the tokens or counts them; it is added to the others."""
    found = find_island(flow, node) if begins_sorted(flow, node) else None
    if found is None:
        return False
    whole = joined({found, *(islands[one] for one in found.nodes if one in islands)}, flow.order)
    if whole is not None:
        islands.update(dict.fromkeys(whole.nodes, whole))
    return whole is not None


def _read_for_their_numbers(nodes: Sequence[ir.Node]) -> set[ir.Node]:
    """The nodes of whose results more is read than the shape."""
    read: set[ir.Value] = {value for node in nodes for value in node.outputs if value.is_graph_output()}
    found: set[ir.Node] = set()
    for node in reversed(nodes):
        if any(value in read for value in node.outputs):
            found.add(node)
            read.update(() if node.op_type in SHAPE_ONLY else read_by(node))
    return found


def _reads_stream(flow: Flow, node: ir.Node) -> bool:
    """Whether a node reads no tensor in which queries meet keys."""
    axes = [axis for value in node.inputs if value is not None for axis in flow.axes.get(value, ())]
    return all(axis.role.resolved() is Length.NEW for axis in axes)


def _batch(inputs: list[GivenInput]) -> Dimension:
    """The batch of the token inputs: the axis before the tokens' one."""
    first = next(given for given in inputs if given.is_token)
    axis = next(iter(first.lengths))
    return first.dimensions[axis - 1] if axis else 1


def _take_or_recall(flow: Flow, node: ir.Node, *, is_read: bool) -> None:
    """Follow tokens through a node; where it mixes them, remember what it reads if only earlier ones count.

    Where it puts rows of the model's own beside them, they are keys or values from there on.
    """
    try:
        _take(flow, node, RULES)
    except Refused:
        recall = find_recall(flow, node) if is_read else None
        if recall is not None:
            take_recall(flow, recall)
        elif (is_read or not _reads_stream(flow, node)) and not _borders(flow, node):
            raise


def _borders(flow: Flow, node: ir.Node) -> bool:
    """Whether a node puts rows of the model's own beside the tokens; where they are then is noted."""
    if node.op_type not in bordering.RULES:
        return False
    try:
        _take(flow, node, bordering.RULES)
    except Refused:
        return False
    return True


def _take(flow: Flow, node: ir.Node, rules: Mapping[str, Rule]) -> None:
    results = tuple(flow.shapes.facts.get(value, NOTHING) for value in node.outputs)
    step = Step(flow, flow.shapes.call(node), results)
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


def _no_rule(step: Step) -> Refused:
    node = step.node
    if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return step.refusal("token data goes through control flow, where its tokens cannot be followed")
    if node.domain not in KNOWN_DOMAINS:
        return Refused(
            f"custom operator {node.domain}::{node.op_type} works on token data, and nothing is known about it",
            at=node.outputs[0].name, expected="standard operators", found=node.domain,
        )  # fmt: skip
    if node.op_type in ("LSTM", "GRU", "RNN", "Scan"):
        return step.mixing()
    return step.refusal("there is no rule that says whether it keeps tokens apart", hint=_PLAINER)


def _check_lengths(step: Step, shape: tuple[Dimension, ...], axes: Axes) -> None:
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


def _check_last(step: Step, found: list[Axes]) -> None:
    """What is made of the last token alone must not reach the others."""
    if any(found):
        raise step.refusal("what is made of the last token is given to all of them")
    step.flow.last.update(step.node.outputs)


def _check_roles(flow: Flow) -> None:
    for place in flow.beside:
        if flow.operands[place].resolved() is None:
            flow.operands[place].root().length = Length.NEW  # nothing made them keys
    for score in flow.scores:
        for role in (score.left_role.root(), score.right_role.root()):
            if role.length is None:
                raise Refused(
                    "two sequence axes meet, but neither is summed against values",
                    at=score.node.outputs[0].name, expected="weights @ values, as in attention",
                )  # fmt: skip
        if score.left_role.resolved() is score.right_role.resolved():
            raise Refused("queries and keys cannot be told apart", at=score.node.outputs[0].name)
    for place, role in flow.operands.items():
        mixes = role.resolved() is Length.NEW and role.root().only_if_total
        if mixes or (place in flow.bordered and role.resolved() is None):
            raise Refused(
                "an operator mixes tokens along the axis of the queries, which no KV cache can carry",
                at=role.root().only_if_total[0],
            )
