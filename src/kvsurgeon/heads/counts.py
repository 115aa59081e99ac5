"""How many heads an attention has, and how many features each, read off its products."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.analysis import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import cache_point_of
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.heads.index_trace import Labels
from kvsurgeon.ops.table import contraction_of
from kvsurgeon.symbolic import dimension as dim


@dataclass(frozen=True, kw_only=True)
class HeadCounts:
    """Sizes of one attention."""

    heads: int  # query heads
    kv_heads: int
    head_dim: int
    value_dim: int  # features of one value head


def counts_of(flow: TokenFlow, head: AttentionSite) -> HeadCounts:
    """Return the sizes of an attention."""
    labels = Labels(flow)
    head_dim, value_dim, heads = _sizes(flow, head)
    kept = (_made(flow, labels, head.keys[0]) // head_dim, _made(flow, labels, head.values[0]) // value_dim)
    kv_heads = max(1, min(kept))  # where heads are repeated before they are remembered, only values tell
    return HeadCounts(heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim)


def _made(flow: TokenFlow, labels: Labels, operand: CachedOperand) -> int:
    """Features of a token before they are repeated, be it before what is remembered."""
    value, fewest = operand.memory.value, operand.memory.elements
    while (node := value.producer()) is not None and labels.keeps_apart(node):
        sources = labels.token_sources(node)
        before = cache_point_of(flow, sources[0]) if len(sources) == 1 else None
        after = cache_point_of(flow, value)
        if before is None or after is None:
            break
        if labels.moves(node) and before.elements < after.elements:
            fewest = min(fewest, before.elements)
        value = sources[0]
    return fewest


def _sizes(flow: TokenFlow, head: AttentionSite) -> tuple[int, int, int]:
    """head_dim, value_head_dim and the number of query heads."""
    if head.fused is not None:
        return _fused_sizes(flow, head)
    score, product = head.scores[0], head.products[0]
    head_dim = _summed(flow, score.node)
    shape = flow.shapes[score.node.outputs[0]].shape or ()
    places = dim.product(dim.add(flow.length, axis.border) for axis in flow.axes[score.node.outputs[0]])
    whole = dim.exact_quotient(dim.product(shape), dim.multiply(flow.batch, places))
    result = flow.shapes[product.node.outputs[0]].shape or ()
    features = dim.exact_quotient(dim.product(result), dim.multiply(flow.batch, flow.length))
    heads = whole if isinstance(whole, int) else 1
    width = features // heads if isinstance(features, int) else head_dim
    return head_dim, width, heads


def _fused_sizes(flow: TokenFlow, head: AttentionSite) -> tuple[int, int, int]:
    assert head.fused is not None
    call = flow.shapes.call(head.fused.node)
    query, value = call.fact(head.fused.query).shape or (), call.fact(head.fused.value).shape or ()
    if len(query) == 4:
        return int(query[3]), int(value[3]), int(query[1])
    heads, kv_heads = call.integer("q_num_heads", 1), call.integer("kv_num_heads", 1)
    return int(query[2]) // heads, int(value[2]) // kv_heads, heads


def _summed(flow: TokenFlow, node: ir.Node) -> int:
    call = flow.shapes.call(node)
    found = contraction_of(call)
    if found is None:
        return 1
    sizes = dict(zip(found.left_labels, call.fact(found.left).shape or (), strict=False))
    total = dim.product(sizes[label] for label in found.summed if label in sizes)
    return total if isinstance(total, int) else 1
