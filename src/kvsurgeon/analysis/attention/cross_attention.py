"""Cross-attention: queries of the tokens, keys and values that are the same in every call.

It is position-wise in the tokens, so nothing of it is cached over time. Its keys and values can be computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.graph.query import producers, upstream
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import axis_links, contraction_of, has_trait, operator_of
from kvsurgeon.symbolic.dimension import BATCH, Dimension

_MAX_VIEWS = 40  # nodes between a projection of keys and the product that reads them


@dataclass(frozen=True, kw_only=True)
class FixedOperand:
    """Keys or values that are the same in every call.

    Attributes:
        place: The input of a product, or of an operator that computes a whole attention, that reads them.
        value: The smallest tensor of them with one axis each of batch, heads, keys and features.
        order: The permutation of its axes that gives [batch, heads, keys, head_dim].
        heads: Number of heads.
        head_dim: Number of features of one head.
    """

    place: Place
    value: ir.Value
    order: tuple[int, ...]
    heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class CrossAttentionSite:
    """Attention of the tokens to keys that are the same in every call.

    Attributes:
        output: The output of the context product.
        scores: The output of the score product; `output` if one operator computes the whole attention.
        key_place: The operand that holds the keys.
        value_place: The operand that holds the values.
        key_length: Number of keys.
        inputs: The graph inputs that keys and values are computed from.
        key: The keys as a tensor with an axis of heads; None if there is none.
        value: The same of the values.
    """

    output: ir.Value
    scores: ir.Value
    key_place: Place
    value_place: Place
    key_length: Dimension
    inputs: frozenset[ir.Value]
    key: FixedOperand | None
    value: FixedOperand | None


def find_cross_attentions(flow: TokenFlow) -> tuple[CrossAttentionSite, ...]:
    """Return the cross-attentions in execution order."""
    found = (_whole(flow, node) or _of_product(flow, node) for node in flow.order if is_token(flow, node.outputs[0]))
    return tuple(one for one in found if one is not None)


def _origins(flow: TokenFlow, place: Place) -> frozenset[ir.Value]:
    """Return the inputs that an operand is computed from if it is the same in every call; none otherwise."""
    value = place[0].inputs[place[1]]
    return frozenset() if value is None else flow.fixed.get(value, frozenset())


def _whole(flow: TokenFlow, node: ir.Node) -> CrossAttentionSite | None:
    """Return the cross-attention that one operator computes."""
    operator = operator_of(node)
    if operator is None or operator.decomposition is None or operator.axes is None:
        return None
    links = axis_links(flow.shapes.call(node))
    if links is None or links.attention is None:
        return None
    stated, place = links.attention, links.attention.layout.index("sequence")
    key, value = (node, stated.key), (node, stated.value)
    shape = flow.shapes[node.inputs[stated.key]].shape if node.inputs[stated.key] is not None else None  # type: ignore[index]
    if shape is None or not _origins(flow, key) or not _origins(flow, value):
        return None
    return _found(flow, node.outputs[0], node.outputs[0], key, value, shape[place])


def _of_product(flow: TokenFlow, node: ir.Node) -> CrossAttentionSite | None:
    """Return the cross-attention whose weights and values a product multiplies."""
    value = _fixed_operand(flow, node)
    if value is None:
        return None
    weights = next(source for source in node.inputs if is_token(flow, source))
    between = producers(upstream([weights], stop=_is_product))
    scores = next((one for one in between if has_trait(one, Trait.PRODUCT)), None)
    key = None if scores is None else _fixed_operand(flow, scores)
    has_softmax = any(has_trait(one, Trait.SOFTMAX) for one in between)
    if scores is None or key is None or not has_softmax:
        return None
    shape, product = flow.shapes[node.inputs[value[1]]].shape, contraction_of(flow.shapes.call(node))  # type: ignore[index]
    labels = () if product is None else (product.left_labels, product.right_labels)[value[1] == product.right]
    summed = frozenset() if product is None else product.summed
    length = next((size for label, size in zip(labels, shape or (), strict=False) if label in summed), None)
    return None if length is None else _found(flow, node.outputs[0], scores.outputs[0], key, value, length)


def _is_product(value: ir.Value) -> bool:
    return has_trait(value.producer(), Trait.PRODUCT)


def _fixed_operand(flow: TokenFlow, node: ir.Node) -> Place | None:
    """Return the operand of a product with token data that is made of an input and the same in every call."""
    if not has_trait(node, Trait.PRODUCT):
        return None
    places = [(node, index) for index, value in enumerate(node.inputs) if value is not None]
    fixed = [place for place in places if _origins(flow, place)]
    return fixed[0] if len(fixed) == 1 and any(is_token(flow, value) for value in node.inputs) else None


def _found(
    flow: TokenFlow, output: ir.Value, scores: ir.Value, key: Place, value: Place, length: Dimension
) -> CrossAttentionSite:
    return CrossAttentionSite(
        output=output, scores=scores, key_place=key, value_place=value, key_length=length,
        inputs=_origins(flow, key) | _origins(flow, value),
        key=_with_heads(flow, key, length), value=_with_heads(flow, value, length),
    )  # fmt: skip


def _with_heads(flow: TokenFlow, place: Place, length: Dimension) -> FixedOperand | None:
    """Return the smallest tensor from which an operand is computed, and that has an axis of heads."""
    operands = (_operand(flow, place, value, length) for value in _views(flow, place))
    found = [operand for operand in operands if operand is not None]
    return min(found, key=lambda one: (one.heads * one.head_dim, one.order != (0, 1, 2, 3)), default=None)


def _views(flow: TokenFlow, place: Place) -> Iterator[ir.Value]:
    """Yield an operand and what it is computed from alone, up to a projection."""
    value: ir.Value | None = place[0].inputs[place[1]]
    for _ in range(_MAX_VIEWS):
        if value is None:
            return
        yield value
        node = value.producer()
        if node is None or has_trait(node, Trait.PROJECTION):
            return
        sources = [source for source in node.inputs if source is not None and flow.fixed.get(source)]
        value = sources[0] if len(sources) == 1 else None


def _operand(flow: TokenFlow, place: Place, value: ir.Value, length: Dimension) -> FixedOperand | None:
    shape = flow.shapes[value].shape or ()
    if len(shape) != 4 or shape.count(length) != 1 or shape[0] not in (BATCH, flow.batch):
        return None
    keys = shape.index(length)
    first, last = (axis for axis in (1, 2, 3) if axis != keys)
    heads, head_dim = shape[first], shape[last]
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return None
    order = (0, first, keys, last)
    return FixedOperand(place=place, value=value, order=order, heads=heads, head_dim=head_dim)
