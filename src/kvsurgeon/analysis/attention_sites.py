"""Attention sites: the products in which queries meet keys and weights are summed against values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint, choose_cache_point, choose_shared_cache_point
from kvsurgeon.analysis.token_flow import ContextProduct, FusedAttention, Place, ScoreProduct, TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import downstream, producers, through, upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable

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
        """The values that the weights are computed from: scores, and other token data along the keys.

        A comparison gives no score that could be any number: what it compares are the sources.
        """
        products = {score.node.outputs[0] for score in self.scores if not score.compares}
        return frozenset((*products, *self.other_queries, *self.other_keys))

    @property
    def other_queries(self) -> tuple[ir.Value, ...]:
        """Token data that is compared with token data along the keys, without views."""
        return tuple(source_of(score.node, score.query_index()) for score in self.scores if score.compares)

    @property
    def other_keys(self) -> tuple[ir.Value, ...]:
        """Token data along the keys that no product reads, without views if it is compared."""
        compared = [source_of(score.node, score.key_index()) for score in self.scores if score.compares]
        met = [node.inputs[index] for node, index in self.other_inputs]
        return tuple(dict.fromkeys(value for value in (*compared, *met) if value is not None))

    @property
    def cached_tensors(self) -> tuple[tuple[str, CachePoint], ...]:
        """The cache points, each tensor once: a "key", a "value", and every further one as a "state".

        A tensor that is read as both is the key, or the value if there is another key.
        """
        keys = {operand.cache_point.value: operand.cache_point for operand in self.keys}
        values = {operand.cache_point.value: operand.cache_point for operand in self.values}
        if len(keys) > 1 and len(values) == 1:
            keys = {value: point for value, point in keys.items() if value not in values}
        parts = (("key", [*keys.values()]), ("value", [point for value, point in values.items() if value not in keys]))
        further = tuple(("state", point) for _, points in parts for point in points[1:])
        return (*((kind, points[0]) for kind, points in parts if points), *further)

    def products_found(self) -> str:
        """Return how many products there are, for a message."""
        others = ", and other token data among the scores" if self.other_inputs else ""
        return f"{len(self.scores)} products with keys and {len(self.products)} with values{others}"

    def read_otherwise(self) -> ir.Value | None:
        """Return a result of a node that reads numbers which are compared, but does not compare them; None if none."""
        nodes, comparisons = self.upstream_of_weights, {score.node for score in self.scores if score.compares}
        numbers = downstream((*self.other_queries, *self.other_keys), stop=lambda node: not _is_view(node))
        read = (node for value in numbers for node, _ in value.uses() if comparisons and node in nodes)
        return next((node.outputs[0] for node in read if not _is_view(node) and node not in comparisons), None)

    @cached_property
    def upstream_of_weights(self) -> frozenset[ir.Node]:
        """The nodes between the scores and the weights that are multiplied with the values."""
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


def source_of(node: ir.Node, index: int) -> ir.Value:
    """Return the tensor that an input of a node is a view of."""
    value = node.inputs[index]
    assert value is not None
    return through(value, _is_view)


def _is_view(node: ir.Node) -> bool:
    return has_trait(node, Trait.RESHAPE, Trait.TRANSPOSE, Trait.IDENTITY)


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
    if not sites and flow.recurrences:
        return ()
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
    products = tuple(product for product in flow.products if product.variable.root() is variable)
    upstream_scores = _upstream_scores(flow, products)
    others = (score for score in flow.scores if variable in (score.left_variable.root(), score.right_variable.root()))
    scores = sorted({score.node: score for score in (*upstream_scores, *others)}.values(), key=lambda one: one.compares)
    fused = next(
        (fused for fused in flow.fused if flow.operands[fused.node, fused.inputs.key].root() is variable), None
    )
    others_met = tuple(place for place in flow.other_inputs if flow.operands[place].root() is variable)
    keys = [*((score.node, score.key_index()) for score in scores), *others_met]
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
        scores=tuple(scores),
        products=products,
        fused=fused,
        other_inputs=others_met,
        keys=operands(keys),
        values=operands(values),
    )
    return _with_shared_cache_points(flow, site, heads)


def _upstream_scores(flow: TokenFlow, products: Sequence[ContextProduct]) -> list[ScoreProduct]:
    """Return the scores that the weights of some products are computed from, nearest first.

    Several attentions may share a mask that is computed from token data.
    """
    by_value = {score.node.outputs[0]: score for score in flow.scores}

    def with_keys(node: ir.Node) -> list[ir.Value]:
        axes = [(value, flow.axes.get(value, ())) for value in content_inputs(node)]
        return [value for value, found in axes if any(axis.variable.resolved() is Length.TOTAL for axis in found)]

    weights = [product.node.inputs[product.weights] for product in products]
    walked = upstream(weights, stop=by_value.__contains__, inputs=with_keys)
    return [by_value[value] for value in walked if value in by_value]


def _with_shared_cache_points(flow: TokenFlow, site: AttentionSite, heads: int) -> AttentionSite:
    """The site with one tensor of keys and one of values, if all that it reads are computed from one."""

    def shared(operands: tuple[CachedOperand, ...]) -> tuple[CachedOperand, ...]:
        try:
            point = choose_shared_cache_point(flow, [operand.place for operand in operands], heads)
        except UnsupportedError:
            return operands
        return tuple(replace(operand, cache_point=point) for operand in operands)

    if len({operand.cache_point.value for operand in site.keys}) > 1:
        site = replace(site, keys=shared(site.keys))
    if len({operand.cache_point.value for operand in site.values}) > 1:
        site = replace(site, values=shared(site.values))
    return site


def _extend_dynamic_ranges(flow: TokenFlow, operand: CachedOperand) -> None:
    """Give a quantization range the length variable of the tensor that it was measured on.

    Raises:
        UnsupportedError: The new rows alone are read in that range too.
    """
    node, index = place = flow.origin(operand.place)
    variable = flow.operands[place]
    pending = [node.inputs[index]]
    while pending:
        value = pending.pop()
        producer = None if value is None or value is operand.cache_point.value else value.producer()
        if producer is None:
            continue
        for output in producer.outputs:
            if value is not None and output in flow.per_call and output is not value:
                _check_reads(flow, value, variable)
                flow.operands |= {(user, at): variable for user, at in output.uses()}
        pending += [source for source in producer.inputs if source is not None and flow.axes.get(source)]


def _check_reads(flow: TokenFlow, number: ir.Value, variable: LengthVariable) -> None:
    """Check that numbers in one range are read at one length alone.

    Raises:
        UnsupportedError: They are not.
    """
    for node, index in number.uses():
        at = flow.operands.get((node, index))
        if at is None and node.outputs[0] in flow.per_call:
            _check_reads(flow, node.outputs[0], variable)
        elif at is None or at.root() is not variable.root():
            raise UnsupportedError(
                "keys or values are quantized in a range that other readers of the same tensor use",
                at=number.name, code=Code.NO_CACHE_POINT, expected="dynamic quantization for each reader",
                found=f"{node.op_type} `{node.outputs[0].name}`",
            )  # fmt: skip
