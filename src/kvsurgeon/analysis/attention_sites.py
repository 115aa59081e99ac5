"""Attention sites: the products in which queries meet keys and weights are summed against values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint, choose_cache_point, choose_shared_cache_point
from kvsurgeon.analysis.token_flow import ContextProduct, FusedAttention, Place, ScoreProduct, TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import producers, upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.symbolic.sequence_axes import LengthVariable

_PATTERN = "weights = softmax(query @ key^T), weights @ value"


@dataclass(frozen=True, kw_only=True)
class CachedOperand:
    """An input of a product that is needed at the total length, and the tensor that is cached for it."""

    place: Place
    cache_point: CachePoint


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention as the graph writes it: products that share the axis of their keys.

    Attributes:
        scores: The products of queries with keys.
        products: The products of weights with values.
        fused: The operator that computes the whole attention, if there is one.
        other_inputs: Token data that meets the scores along the keys without being multiplied with queries.
        keys: Operands that hold keys.
        values: Operands that hold values.
    """

    scores: tuple[ScoreProduct, ...]
    products: tuple[ContextProduct, ...]
    fused: FusedAttention | None
    other_inputs: tuple[Place, ...]
    keys: tuple[CachedOperand, ...]
    values: tuple[CachedOperand, ...]

    @property
    def at(self) -> ir.Value:
        """The output of the attention: that of its context product."""
        node = self.fused.node if self.fused is not None else self.products[0].node
        return node.outputs[0]

    @property
    def score_values(self) -> frozenset[ir.Value]:
        """The outputs of the score products."""
        return frozenset(score.node.outputs[0] for score in self.scores)

    @property
    def weight_sources(self) -> frozenset[ir.Value]:
        """The values that the weights are computed from: scores, and other token data along the keys."""
        met = {value for node, index in self.other_inputs if (value := node.inputs[index]) is not None}
        return self.score_values | met

    @property
    def cached_tensors(self) -> tuple[tuple[str, CachePoint], ...]:
        """The cache points, each tensor once, as "key" or as "value".

        A tensor that is read as both is the key, or the value if there is another key.
        """
        keys = {operand.cache_point.value: operand.cache_point for operand in self.keys}
        values = {operand.cache_point.value: operand.cache_point for operand in self.values}
        if len(keys) > 1 and len(values) == 1:
            keys = {value: point for value, point in keys.items() if value not in values}
        return (
            *(("key", point) for point in keys.values()),
            *(("value", point) for value, point in values.items() if value not in keys),
        )

    def upstream_of_weights(self) -> frozenset[ir.Node]:
        """Return the nodes between the scores and the weights that are multiplied with the values."""
        return self.upstream_of(product.node.inputs[product.weights] for product in self.products)

    def upstream_of(self, values: Iterable[ir.Value | None]) -> frozenset[ir.Node]:
        """Return the nodes between the scores and some values, without those of which only the shape is read."""
        sources = self.weight_sources
        walked = upstream(values, stop=sources.__contains__, inputs=content_inputs)
        return frozenset(producers(value for value in walked if value not in sources))

    @property
    def ends(self) -> frozenset[ir.Node]:
        """The context products, at which the attention ends."""
        return frozenset(product.node for product in self.products)


def find_attention_sites(flow: TokenFlow, at: str | None) -> tuple[AttentionSite, ...]:
    """Return the attention sites in execution order.

    Args:
        flow: The token flow of the graph.
        at: Name of an output, for a message.

    Raises:
        UnsupportedError: There are none, or one needs a tensor that cannot be cached.
    """
    sites: list[AttentionSite] = []
    for variable in _key_variables(flow):
        try:
            sites.append(_site(flow, variable))
        except UnsupportedError as error:
            error.layer = len(sites)
            raise
    for site in sites:
        for operand in (*site.keys, *site.values):
            _extend_dynamic_ranges(flow, operand)
    if not sites and flow.states:
        first = flow.states[0].nodes[0]
        raise UnsupportedError(
            f"{first.op_type} mixes tokens along the sequence, and the graph has no attention",
            at=first.outputs[0].name, expected=_PATTERN, code=Code.MIXES_TOKENS,
        )  # fmt: skip
    if not sites:
        raise UnsupportedError(
            "no attention found: no softmax(Q·Kᵀ)·V pattern in the graph", at=at, expected=_PATTERN,
            hint="is this a decoder-only language model?", code=Code.NO_ATTENTION,
        )  # fmt: skip
    return tuple(sites)


def _key_variables(flow: TokenFlow) -> list[LengthVariable]:
    """The length variables of the keys' axes, in execution order."""
    found: dict[LengthVariable, int] = {}
    for node, variable in [
        *((product.node, product.variable.root()) for product in flow.products),
        *((fused.node, flow.operands[fused.node, fused.inputs.key].root()) for fused in flow.fused),
    ]:
        found[variable] = min(found.get(variable, flow.order[node]), flow.order[node])
    return sorted(found, key=lambda variable: found[variable])


def _site(flow: TokenFlow, variable: LengthVariable) -> AttentionSite:
    scores = tuple(
        score for score in flow.scores if variable in (score.left_variable.root(), score.right_variable.root())
    )
    products = tuple(product for product in flow.products if product.variable.root() is variable)
    fused = next(
        (fused for fused in flow.fused if flow.operands[fused.node, fused.inputs.key].root() is variable), None
    )
    others = tuple(place for place in flow.other_inputs if flow.operands[place].root() is variable)
    keys = [*((score.node, score.key_index()) for score in scores), *others]
    values = [(product.node, product.value) for product in products]
    heads = 1
    if fused is not None:
        keys, values, heads = (
            [(fused.node, fused.inputs.key)],
            [(fused.node, fused.inputs.value)],
            fused.inputs.packed_heads,
        )

    def operands(places: list[Place]) -> tuple[CachedOperand, ...]:
        return tuple(CachedOperand(place=at, cache_point=choose_cache_point(flow, at, heads)) for at in places)

    site = AttentionSite(
        scores=scores, products=products, fused=fused, other_inputs=others, keys=operands(keys), values=operands(values)
    )
    return _with_shared_cache_points(flow, site, heads)


def _with_shared_cache_points(flow: TokenFlow, site: AttentionSite, heads: int) -> AttentionSite:
    """The site with one tensor of keys and one of values, if all that it reads are computed from one."""

    def shared(operands: tuple[CachedOperand, ...]) -> tuple[CachedOperand, ...]:
        try:
            point = choose_shared_cache_point(flow, [operand.place for operand in operands], heads)
        except UnsupportedError:
            return operands
        return tuple(replace(operand, cache_point=point) for operand in operands)

    if [kind for kind, _ in site.cached_tensors].count("key") > 1:
        site = replace(site, keys=shared(site.keys))
    if [kind for kind, _ in site.cached_tensors].count("value") > 1:
        site = replace(site, values=shared(site.values))
    if site.other_inputs and len(site.cached_tensors) > 2:
        node, index = site.other_inputs[0]
        raise UnsupportedError(
            "attention needs token data other than keys and values at the total length", code=Code.NO_CACHE_POINT,
            at=getattr(node.inputs[index], "name", None), expected="a tensor that keys or values are computed from too",
        )  # fmt: skip
    return site


def _extend_dynamic_ranges(flow: TokenFlow, operand: CachedOperand) -> None:
    """Give a quantization range the length variable of the tensor that it was measured on."""
    node, index = place = flow.origin(operand.place)
    variable = flow.operands[place]
    pending = [node.inputs[index]]
    while pending:
        value = pending.pop()
        producer = None if value is None or value is operand.cache_point.value else value.producer()
        if producer is None:
            continue
        for output in producer.outputs:
            if output in flow.per_call and output is not value:
                flow.operands |= {(user, at): variable for user, at in output.uses()}
        pending += [source for source in producer.inputs if source is not None and flow.axes.get(source)]
