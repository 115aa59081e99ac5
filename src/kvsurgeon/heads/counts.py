"""The number of heads of an attention and the features of each."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import cache_point_of
from kvsurgeon.analysis.token_data import token_inputs
from kvsurgeon.analysis.token_flow import FusedAttention, TokenFlow
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.ops.table import contraction_of
from kvsurgeon.symbolic import dimension as dim


@dataclass(frozen=True, kw_only=True)
class HeadCounts:
    """Sizes of an attention.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Features of one query or key head.
        value_dim: Features of one value head.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


def counts_of(flow: TokenFlow, site: AttentionSite) -> HeadCounts:
    """Return the sizes of an attention."""
    head_dim, value_dim, heads = _sizes(flow, site) if site.fused is None else _fused_sizes(flow, site.fused)
    keys, values = _width_before_repetition(flow, site.keys[0]), _width_before_repetition(flow, site.values[0])
    # If keys are repeated before the cache point, only the values have the number of KV heads.
    kv_heads = max(1, min(keys // head_dim, values // value_dim))
    return HeadCounts(heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)


def _width_before_repetition(flow: TokenFlow, operand: CachedOperand) -> int:
    """Features of one token before heads are repeated, also if that is before the cache point."""
    trace = IndexTrace(flow)
    value, fewest = operand.cache_point.value, operand.cache_point.elements
    while (node := value.producer()) is not None and trace.is_elementwise(node):
        sources = token_inputs(flow, node)
        before = cache_point_of(flow, sources[0]) if len(sources) == 1 else None
        after = cache_point_of(flow, value)
        if before is None or after is None:
            break
        if trace.rearranges(node) and before.elements < after.elements:
            fewest = min(fewest, before.elements)
        value = sources[0]
    return fewest


def _sizes(flow: TokenFlow, site: AttentionSite) -> tuple[int, int, int]:
    """head_dim, features of a value head, and the number of query heads, from the shapes of the two products."""
    score, product = site.scores[0].node, site.products[0].node
    head_dim = _summed(flow, score)
    tokens = dim.product(dim.add(flow.length, axis.learned_rows) for axis in flow.axes[score.outputs[0]])
    scores = dim.product(flow.shapes[score.outputs[0]].shape or ())
    heads = dim.exact_quotient(scores, dim.multiply(flow.batch, tokens))
    heads = heads if isinstance(heads, int) else 1
    result = dim.product(flow.shapes[product.outputs[0]].shape or ())
    features = dim.exact_quotient(result, dim.multiply(flow.batch, flow.length))
    return head_dim, features // heads if isinstance(features, int) else head_dim, heads


def _fused_sizes(flow: TokenFlow, fused: FusedAttention) -> tuple[int, int, int]:
    """The same, from the operands and attributes of one operator."""
    call = flow.shapes.call(fused.node)
    query, value = call.fact(fused.inputs.query).shape or (), call.fact(fused.inputs.value).shape or ()
    if len(query) == 4:
        return int(query[3]), int(value[3]), int(query[1])
    heads, kv_heads = call.integer("q_num_heads", 1), call.integer("kv_num_heads", 1)
    return int(query[2]) // heads, int(value[2]) // kv_heads, heads


def _summed(flow: TokenFlow, score: ir.Node) -> int:
    """The number of products that the score product sums: head_dim."""
    call = flow.shapes.call(score)
    found = contraction_of(call)
    if found is None:
        return 1
    sizes = dict(zip(found.left_labels, call.fact(found.left).shape or (), strict=False))
    total = dim.product(sizes[label] for label in found.summed if label in sizes)
    return total if isinstance(total, int) else 1
