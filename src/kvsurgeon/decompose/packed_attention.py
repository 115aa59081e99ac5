"""`Attention` and `QAttention` of com.microsoft: fused projection, heads, mask and products in one node."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.decompose.fused_node import FusedNode
from kvsurgeon.decompose.padding_masks import padding_bias
from kvsurgeon.decompose.softmax_attention import causal_mask, score_scale, softmax_attention


def attention(op: FusedNode) -> None:
    """Decompose `Attention`.

    Raises:
        UnsupportedError: It has a past, rotates queries and keys, or has an unknown mask.
    """
    _decompose(op, op.MatMul(op.input(0), op.input(1)), mask=3, bias=5, past=(4, 6))


def quantized_attention(op: FusedNode) -> None:
    """Decompose `QAttention`.

    Raises:
        UnsupportedError: As `attention`.
    """
    zero_points = [op.optional(6), op.optional(7)]
    operands = [op.input(0), op.input(1), *zero_points][: 4 if zero_points[1] else 3 if zero_points[0] else 2]
    product = op.MatMulInteger(*operands)
    scale = op.Mul(op.input(3), op.input(4))
    _decompose(op, op.Mul(op.Cast(product, to=op.dtype), scale), mask=5, bias=-1, past=(8,))


def _decompose(op: FusedNode, projected: ir.Value, *, mask: int, bias: int, past: tuple[int, ...]) -> None:
    heads = op.node.attributes.get_int("num_heads", 0)
    if any(op.optional(index) is not None for index in past):
        raise op.unsupported_past()
    if op.flag("do_rotary") or not heads:
        raise op.unsupported("do_rotary is not supported", hint="export rotary embeddings as separate operators")
    added = op.optional(2)
    projected = projected if added is None else op.Add(projected, added)
    widths = _widths(op)
    query, key, value = (op.split_heads(part, heads) for part in op.split(projected, widths, axis=2))
    causal = op.flag("unidirectional")
    scale, biases = score_scale(op, widths[0] // heads), (op.optional(bias), padding_bias(op, mask, causal=causal))
    visible = causal_mask(op) if causal else None
    op.finish(op.merge_heads(softmax_attention(op, query, key, value, scale=scale, biases=biases, mask=visible)))


def _widths(op: FusedNode) -> list[int]:
    """Return the features of queries, keys and values."""
    declared = op.node.attributes.get_ints("qkv_hidden_sizes", None)
    if declared:
        return list(declared)
    width = op.size(1)
    if width % 3:
        raise op.unsupported(
            "weights cannot be split into queries, keys and values", expected="a multiple of 3 columns",
            found=str(width), hint="set qkv_hidden_sizes",
        )  # fmt: skip
    return [width // 3] * 3
