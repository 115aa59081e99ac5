"""`MultiHeadAttention` of com.microsoft: heads, mask and products in one node, after separate projections."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.decompose.fused_node import FusedNode
from kvsurgeon.decompose.padding_masks import padding_bias
from kvsurgeon.decompose.softmax_attention import causal_mask, score_scale, softmax_attention

BIAS, PADDING, SCORE_BIAS, PAST = 3, 4, 5, (6, 7, 8, 9)


def multi_head_attention(op: FusedNode) -> None:
    """Decompose `MultiHeadAttention`.

    Raises:
        UnsupportedError: It has a past, or an unknown mask.
    """
    heads = op.node.attributes.get_int("num_heads", 0)
    if any(op.optional(index) is not None for index in PAST):
        raise op.unsupported_past()
    parts = _queries_keys_values(op, heads)
    head_dim = op.size(0) if op.rank(0) == 5 else op.size(0) // heads
    query, key, value = (
        part if op.rank(index) == 4 else op.split_heads(part, heads) for index, part in enumerate(parts)
    )
    causal = op.flag("unidirectional")
    biases = (op.optional(SCORE_BIAS), padding_bias(op, PADDING, causal=causal))
    mask = causal_mask(op) if causal else None
    scale = score_scale(op, head_dim)
    op.finish(op.merge_heads(softmax_attention(op, query, key, value, scale=scale, biases=biases, mask=mask)))


def _queries_keys_values(op: FusedNode, heads: int) -> Sequence[ir.Value]:
    """Return queries, keys and values with their bias, `[batch, sequence, hidden]`; keys and values can have heads.

    Packed inputs are `[batch, sequence, heads, 3, head_dim]`; keys and values alone have a 2 there.
    """
    if op.rank(0) == 5 and op.optional(1) is None and op.optional(2) is None:
        parts = _unpack(op, op.input(0), 3)
        widths = [heads * op.size(0)] * 3
    elif op.rank(1) == 5 and op.optional(2) is None:
        parts = [op.input(0), *_unpack(op, op.input(1), 2)]
        widths = [op.size(0)] * 3
    else:
        parts = [op.input(index) for index in range(3)]
        widths = [op.size(index) * (heads if op.rank(index) == 4 else 1) for index in range(3)]
    bias = op.optional(BIAS)
    if bias is None:
        return parts
    biases = op.split(bias, widths, axis=0)
    return [
        part if op.rank(index) == 4 else op.Add(part, one)
        for index, (part, one) in enumerate(zip(parts, biases, strict=True))
    ]


def _unpack(op: FusedNode, packed: ir.Value, parts: int) -> list[ir.Value]:
    return [op.reshape(part, 0, 0, -1) for part in op.split(packed, [1] * parts, axis=3)]
