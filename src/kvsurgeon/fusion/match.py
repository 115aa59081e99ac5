"""Match attention sites with what a fused operator computes: softmax(softcap(scale * Q @ K^T) + bias) @ V.

An attention sink is one more score in the softmax, learned for each head, whose weight is dropped.
The bias is the result of the graph between scores and softmax for scores of zero, so masks, position biases and tables
need not be recognized. A match is read off the operators; `kvsurgeon.fusion.numeric_check` runs it and compares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.attention_sites import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint, cache_point_of
from kvsurgeon.analysis.token_data import token_inputs
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.anatomy.scales import number_of
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.fusion.operator_mask import OperatorMask
from kvsurgeon.fusion.operator_rotary import OperatorRotary
from kvsurgeon.fusion.score_path import MOVES, ScorePath, constant_factor, trace_scores
from kvsurgeon.graph.query import chain
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.rewrite.layout_trace import LayoutTrace, trace_layout
from kvsurgeon.symbolic import dimension as dim

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True, kw_only=True)
class FusionMatch:
    """An attention site that a fused operator can compute.

    Attributes:
        layer: Index of the attention layer.
        site: The attention site.
        query: Queries that the operator reads, as [batch, heads, sequence, head_dim], before they are scaled.
        key: Keys that the operator reads, as [batch, kv_heads, sequence, head_dim], before they are repeated or scaled.
        value: Values that the operator reads, as [batch, kv_heads, sequence, head_dim].
        result: Output of the context product, as [batch, heads, sequence, head_dim].
        path: Scale, softcap and operators between scores and softmax.
        sink: Learned scores of the attention sinks, one for each query head or one for all; None if there are none.
        mask: The mask that the operator applies itself, if it is all that is added to scores; None otherwise.
        rotary: The rotary embedding that the operator computes; None if it reads rotated queries and keys.
    """

    layer: int
    site: AttentionSite
    query: CachePoint
    key: CachePoint
    value: CachePoint
    result: CachePoint
    path: ScorePath
    sink: ir.Value | None = None
    mask: OperatorMask | None = None
    rotary: OperatorRotary | None = None

    @property
    def scores(self) -> ir.Value | None:
        """Output of the score product; None for a fused attention operator."""
        return self.site.scores[0].node.outputs[0] if self.site.scores else None

    @property
    def dtype(self) -> ir.DataType:
        """Type that the attention is computed in."""
        return self.query.dtype

    def unsupported(self, reason: str, *, expected: str, found: str) -> UnsupportedError:
        """Return the error that a fused operator cannot compute the site."""
        return UnsupportedError(
            reason, code=Code.NOT_FUSABLE, layer=self.layer, at=self.site.at.name, expected=expected, found=found
        )


def match_attention(analysis: Analysis, layer: int, *, cached: bool) -> FusionMatch:
    """Return the match of an attention layer.

    Args:
        analysis: The decoder.
        layer: Index of the attention layer.
        cached: Whether the operator keeps the KV cache, so that it must read the cached tensors.

    Raises:
        UnsupportedError: The layer computes something else.
    """
    flow, site = analysis.flow, analysis.sites[layer]
    try:
        query, result, path = (_match_operator if site.fused is not None else _match_products)(flow, site)
        (key, scale), (value, _) = (_operand(flow, site, one[0], cached) for one in (site.keys, site.values))
        if key.heads != value.heads and not cached:
            (key, scale), (value, _) = (_read(flow, one[0]) for one in (site.keys, site.values))
        path = replace(path, scale=path.scale * scale)
        sink = None if path.sink is None else _sink(flow, path.sink, query.heads, query.dtype)
        match = FusionMatch(
            layer=layer, site=site, query=query, key=key, value=value, result=result, path=path, sink=sink
        )
        _check_heads(match)
    except UnsupportedError as error:
        error.layer = layer
        raise
    return match


def _match_operator(flow: TokenFlow, site: AttentionSite) -> tuple[CachePoint, CachePoint, ScorePath]:
    """Return query, result and score path of an ONNX `Attention` operator."""
    fused = site.fused
    assert fused is not None
    attributes, heads = fused.node.attributes, 1
    if fused.inputs.packed_heads != 1:
        heads = flow.shapes.call(fused.node).integer("q_num_heads", 1)
    query = _describe(flow, fused.node.inputs[fused.inputs.query], heads)
    path = ScorePath(
        scale=attributes.get_float("scale", 0.0) or 1 / math.sqrt(query.head_dim),
        softcap=attributes.get_float("softcap", 0.0),
        steps=(),
        masked=None if fused.inputs.mask is None else fused.node.inputs[fused.inputs.mask],
    )
    return query, _describe(flow, fused.node.outputs[0], heads), path


def _match_products(flow: TokenFlow, site: AttentionSite) -> tuple[CachePoint, CachePoint, ScorePath]:
    """Return query, result and score path of an attention of standard operators."""
    scores, products = site.scores, site.products
    if len(scores) != 1 or len(products) != 1 or site.other_inputs:
        raise UnsupportedError(
            "the scores are not one product of queries and keys", code=Code.NOT_FUSABLE, at=site.at.name,
            expected="one score product and one context product",
            found=site.products_found(),
        )  # fmt: skip
    node = scores[0].node
    query, scale = _query(flow, node.inputs[scores[0].query_index()])
    path = trace_scores(flow, site)
    alpha = node.attributes.get_float("alpha", 1.0) if node.op_type == "FusedMatMul" else 1.0
    result = _describe(flow, products[0].node.outputs[0])
    return query, result, replace(path, scale=path.scale * scale * alpha)


def _operand(flow: TokenFlow, site: AttentionSite, operand: CachedOperand, cached: bool) -> tuple[CachePoint, float]:
    """Return the cache point of keys or values and the factor between it and the product."""
    node, index = operand.place
    value, is_key = node.inputs[index], operand in site.keys
    assert value is not None
    trace = trace_layout(flow, {node: tuple(node.inputs) for node in flow.order}, value, operand.cache_point)
    scale = None if trace is None or (trace.scales and not is_key) else _scale_of(flow, trace)
    if scale is not None:
        return operand.cache_point, scale
    if not cached:
        return _read(flow, operand)
    raise UnsupportedError(
        f"{'keys' if is_key else 'values'} are computed from the cached tensor", code=Code.NOT_FUSABLE,
        at=value.name, expected="layout operators and repeated heads between cache and product",
        found=f"`{operand.cache_point.value.name}` cached",
    )  # fmt: skip


def _read(flow: TokenFlow, operand: CachedOperand) -> tuple[CachePoint, float]:
    """Return keys or values as the product reads them."""
    node, index = operand.place
    return _describe(flow, node.inputs[index]), 1.0


def _scale_of(flow: TokenFlow, trace: LayoutTrace) -> float | None:
    """Return the product of the scalars on a layout trace; None if one is not constant."""
    scale = 1.0
    for operator, value in trace.scales:
        number = number_of(flow, value)
        if not number:
            return None
        scale = scale * number if operator == "Mul" else scale / number
    return scale


def _query(flow: TokenFlow, operand: ir.Value | None) -> tuple[CachePoint, float]:
    """Return the queries before scaling, and their scale."""
    found, scale = _describe(flow, operand), 1.0
    value, factor = operand, 1.0
    while value is not None and (node := value.producer()) is not None and node in flow.order:
        if has_trait(node, *MOVES):
            value = node.inputs[0]
            continue
        tokens = token_inputs(flow, node)
        number = constant_factor(flow, node, tokens[0]) if len(tokens) == 1 else None
        if number is None:
            break
        value, factor = tokens[0], factor * number
        point = cache_point_of(flow, value)
        if point is not None and (point.heads, point.head_dim) == (found.heads, found.head_dim):
            found, scale = point, factor
    return found, scale


def _sink(flow: TokenFlow, joined: ir.Value, heads: int, dtype: ir.DataType) -> ir.Value:
    """Return the constant that learned scores repeat for each query: one element for each head, or one for all."""

    def source(node: ir.Node) -> ir.Value | None:
        return node.inputs[0] if has_trait(node, *MOVES, Trait.REPEAT, Trait.IDENTITY) else None

    for value in chain(joined, source):
        shape = flow.shapes[value].shape or ()
        if value not in flow.kinds and dim.product(shape) in (1, heads) and flow.shapes[value].dtype is dtype:
            return value
    raise UnsupportedError(
        "learned scores are not one number for each head", code=Code.NOT_FUSABLE, at=joined.name,
        expected=f"{heads} constants, or 1", hint="fuse the other layers with --layers supported",
    )  # fmt: skip


def _describe(flow: TokenFlow, value: ir.Value | None, heads: int = 1) -> CachePoint:
    found = None if value is None else cache_point_of(flow, value, heads)
    if found is None:
        raise UnsupportedError(
            "cannot tell heads from features", code=Code.UNTRACEABLE_HEADS, at=getattr(value, "name", None)
        )
    return found


def _check_heads(match: FusionMatch) -> None:
    query, key, value, result = match.query, match.key, match.value, match.result
    dtypes = {query.dtype, key.dtype, value.dtype, result.dtype}
    if key.value is value.value:
        raise match.unsupported(
            "keys and values are one tensor", expected="a key and a value tensor", found=f"`{key.value.name}` for both"
        )
    if len(dtypes) > 1 or not dtypes <= _FLOATS:
        raise match.unsupported(
            "the type of queries, keys and values has no fused kernel",
            expected="float, float16 or bfloat16 for all",
            found=" and ".join(sorted(one.name.lower() for one in dtypes)),
        )
    if query.head_dim != key.head_dim or result.head_dim != value.head_dim:
        raise match.unsupported(
            "the cached tensors have another head_dim than the products",
            expected=f"{query.head_dim} and {result.head_dim}", found=f"{key.head_dim} and {value.head_dim}",
        )  # fmt: skip
    if key.heads != value.heads or query.heads % key.heads or result.heads != query.heads:
        raise match.unsupported(
            "the number of query heads is not a multiple of the number of KV heads",
            expected=f"a divisor of {query.heads} query heads",
            found=f"{key.heads} key heads and {value.heads} value heads",
        )
