"""The whole analysis of a decoder: what is given, what is followed, what must be remembered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint, choose_cache_point, choose_shared_cache_point
from kvsurgeon.analysis.common_subexpressions import find_common_subexpressions
from kvsurgeon.analysis.propagation import follow_tokens
from kvsurgeon.analysis.token_flow import ContextProduct, FusedAttention, Place, ScoreProduct, TokenFlow
from kvsurgeon.dataflow.input_roles import InputRole, classify_inputs, read_inputs
from kvsurgeon.dataflow.shape_inference import Shapes, infer_shapes
from kvsurgeon.dataflow.value_kinds import find_kinds
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.graph.query import find_live
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import LengthVariable


@dataclass(frozen=True, kw_only=True)
class CachedOperand:
    """An input of a product that is needed for all tokens so far, and the tensor that is remembered for it."""

    place: Place
    memory: CachePoint


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention as the graph writes it: products that share the axis of their keys."""

    scores: tuple[ScoreProduct, ...]
    products: tuple[ContextProduct, ...]
    fused: FusedAttention | None
    beside: tuple[Place, ...]  # what meets the scores along their keys without being multiplied with queries
    keys: tuple[CachedOperand, ...]
    values: tuple[CachedOperand, ...]

    @property
    def at(self) -> ir.Value:
        """Where the attention ends: the output of its context product."""
        node = self.fused.node if self.fused is not None else self.products[0].node
        return node.outputs[0]

    @property
    def score_values(self) -> frozenset[ir.Value]:
        """The outputs of the score products."""
        return frozenset(score.node.outputs[0] for score in self.scores)

    @property
    def weight_sources(self) -> frozenset[ir.Value]:
        """The values that the weights are computed from: scores, and other token data along the keys."""
        met = {value for node, index in self.beside if (value := node.inputs[index]) is not None}
        return self.score_values | met

    @property
    def memories(self) -> tuple[tuple[str, CachePoint], ...]:
        """What is remembered, each tensor once, as "key" or as "value".

        A tensor that is read as both is the key, or where there is another key the value.
        """
        keys = {operand.memory.value: operand.memory for operand in self.keys}
        values = {operand.memory.value: operand.memory for operand in self.values}
        if len(keys) > 1 and len(values) == 1:
            keys = {value: memory for value, memory in keys.items() if value not in values}
        return (
            *(("key", memory) for memory in keys.values()),
            *(("value", memory) for value, memory in values.items() if value not in keys),
        )

    def upstream_of_weights(self) -> frozenset[ir.Node]:
        """The nodes between the scores and the weights that the values are multiplied with."""
        return self.upstream_of(product.node.inputs[product.weights] for product in self.products)

    def upstream_of(self, values: Iterable[ir.Value | None]) -> frozenset[ir.Node]:
        """The nodes between the scores and some values; what only a shape is read of lies elsewhere."""
        found: set[ir.Node] = set()
        pending = list(values)
        while pending:
            value = pending.pop()
            node = None if value is None or value in self.weight_sources else value.producer()
            if node is not None and node not in found:
                found.add(node)
                pending += () if node.op_type in SHAPE_ONLY else node.inputs
        return frozenset(found)

    @property
    def ends(self) -> frozenset[ir.Node]:
        """The context products, at which the attention ends."""
        return frozenset(product.node for product in self.products)


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What is known of a decoder, with references into its graph."""

    model: ir.Model
    inputs: list[InputRole]
    length: Dimension
    shapes: Shapes
    flow: TokenFlow
    same: dict[ir.Value, ir.Value]
    heads: tuple[AttentionSite, ...]  # in execution order
    states: tuple[CachePoint, ...]  # what is remembered outside attention, in execution order


def analyze(model: ir.Model) -> Analysis:
    """Return the anatomy of a decoder without a cache, in standard operators.

    Raises:
        UnsupportedError: It is not a causal decoder that can be handled soundly; nothing was changed.
    """
    graph = model.graph
    alive = find_live(graph)
    nodes: Sequence[ir.Node] = [node for node in graph if node in alive]
    dimensions, length = read_inputs(graph)
    inputs = classify_inputs(graph, dimensions, length)
    shapes = infer_shapes(nodes, dimensions, graph.opset_imports.get("", 1))
    kinds = find_kinds(nodes, inputs, shapes)
    flow = follow_tokens(nodes, inputs, shapes, kinds, length, graph.opset_imports)
    return Analysis(
        model=model, inputs=inputs, length=length, shapes=shapes, flow=flow,
        same=find_common_subexpressions(nodes, kinds, shapes),
        heads=_heads(flow, at=graph.outputs[0].name if graph.outputs else None),
        states=_states(flow),
    )  # fmt: skip


def _states(flow: TokenFlow) -> tuple[CachePoint, ...]:
    found = [choose_cache_point(flow, place) for recall in flow.states for place in recall.places]
    return tuple({memory.value: memory for memory in found}.values())


def _heads(flow: TokenFlow, at: str | None) -> tuple[AttentionSite, ...]:
    heads: list[AttentionSite] = []
    for role in _key_roles(flow):
        scores = tuple(score for score in flow.scores if role in (score.left_role.root(), score.right_role.root()))
        products = tuple(product for product in flow.products if product.role.root() is role)
        fused = next((fused for fused in flow.fused if flow.operands[fused.node, fused.key].root() is role), None)
        met = tuple(place for place in flow.beside if flow.operands[place].root() is role)
        keys = [*((score.node, score.key_index()) for score in scores), *met]
        values = [(product.node, product.value) for product in products]
        if fused is not None:
            keys, values = [(fused.node, fused.key)], [(fused.node, fused.value)]
        beside = 1 if fused is None else fused.heads_beside
        head = AttentionSite(
            scores=scores, products=products, fused=fused, beside=met,
            keys=_operands(flow, keys, len(heads), beside), values=_operands(flow, values, len(heads), beside),
        )  # fmt: skip
        try:
            heads.append(_with_fewer_memories(flow, head, beside))
        except UnsupportedError as refusal:
            refusal.layer = len(heads)
            raise
    for head in heads:
        for operand in (*head.keys, *head.values):
            _carry_ranges(flow, operand)
    if not heads and flow.states:
        first = flow.states[0].nodes[0]
        raise UnsupportedError(
            f"{first.op_type} mixes tokens along the sequence outside attention, and there is no attention beside it",
            at=first.outputs[0].name, expected="weights = softmax(query @ key^T), weights @ value",
        )  # fmt: skip
    if not heads:
        raise UnsupportedError(
            "no attention was found: nowhere do two sequence axes meet and get summed again",
            at=at,
            expected="weights = softmax(query @ key^T), weights @ value",
            hint="is this a decoder-only language model?",
        )
    return tuple(heads)


def _carry_ranges(flow: TokenFlow, operand: CachedOperand) -> None:
    """Ranges taken over the tokens of a call belong to the tensor that they were taken of, at its length."""
    node, index = place = flow.origin(operand.place)
    role = flow.operands[place]
    pending = [node.inputs[index]]
    while pending:
        value = pending.pop()
        maker = None if value is None or value is operand.memory.value else value.producer()
        if maker is None:
            continue
        for output in maker.outputs:
            if output in flow.per_call and output is not value:
                flow.operands |= {(user, place): role for user, place in output.uses()}
        pending += [source for source in maker.inputs if source is not None and flow.axes.get(source)]


def _key_roles(flow: TokenFlow) -> list[LengthVariable]:
    """The roles of keys' axes, in execution order."""
    found: dict[LengthVariable, int] = {}
    for node, role in [
        *((product.node, product.role.root()) for product in flow.products),
        *((fused.node, flow.operands[fused.node, fused.key].root()) for fused in flow.fused),
    ]:
        found[role] = min(found.get(role, flow.order[node]), flow.order[node])
    return sorted(found, key=lambda role: found[role])


def _with_fewer_memories(flow: TokenFlow, head: AttentionSite, beside: int) -> AttentionSite:
    """The head with one tensor of keys and one of values, where those it reads are made of one."""
    if [kind for kind, _ in head.memories].count("key") > 1:
        head = replace(head, keys=_together(flow, head.keys, beside))
    if [kind for kind, _ in head.memories].count("value") > 1:
        head = replace(head, values=_together(flow, head.values, beside))
    if head.beside and len(head.memories) > 2:
        node, index = head.beside[0]
        raise UnsupportedError(
            "token data of all tokens so far is needed beside keys and values, and would be state of its own",
            at=getattr(node.inputs[index], "name", None), expected="a tensor that keys or values are made of as well",
        )  # fmt: skip
    return head


def _together(flow: TokenFlow, operands: tuple[CachedOperand, ...], beside: int) -> tuple[CachedOperand, ...]:
    try:
        memory = choose_shared_cache_point(flow, [operand.place for operand in operands], beside)
    except UnsupportedError:
        return operands
    return tuple(replace(operand, memory=memory) for operand in operands)


def _operands(flow: TokenFlow, places: list[Place], layer: int, beside: int) -> tuple[CachedOperand, ...]:
    try:
        return tuple(CachedOperand(place=place, memory=choose_cache_point(flow, place, beside)) for place in places)
    except UnsupportedError as refusal:
        refusal.layer = layer
        raise
