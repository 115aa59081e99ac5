"""Softmax attention in standard operators: softmax(scale * Q·Kᵀ + biases) · V, with softcap, mask and sink."""

from __future__ import annotations

import math
from collections.abc import Iterable

import onnx_ir as ir

from kvsurgeon.decompose.fused_node import FusedNode


def softmax_attention(
    op: FusedNode,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    *,
    scale: float,
    softcap: float = 0.0,
    biases: Iterable[ir.Value | None] = (),
    mask: ir.Value | None = None,
    sink: ir.Value | None = None,
) -> ir.Value:
    """Return the attention output, `[batch, heads, S, head_dim]`.

    Args:
        op: The fused node.
        query: `[batch, heads, S, head_dim]`.
        key: `[batch, heads, T, head_dim]`.
        value: `[batch, heads, T, head_dim]`.
        scale: Factor of the scores.
        softcap: Bound of the scores, as softcap * tanh(scores / softcap); none if 0.
        biases: Added to the scores, each broadcastable to `[batch, heads, S, T]`.
        mask: Whether a query attends to a key, broadcastable to `[batch, heads, S, T]`; to all if None.
        sink: Scores of attention sinks, `[1, heads, 1, 1]` or a scalar: they take weight, and have no value.
    """
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    scores = op.Mul(scores, op.number(scale))
    if softcap:
        bound = op.number(softcap)
        scores = op.Mul(op.Tanh(op.Div(scores, bound)), bound)
    for bias in biases:
        scores = scores if bias is None else op.Add(scores, bias)
    if mask is not None:
        scores = op.Where(mask, scores, op.lowest())
    return op.MatMul(_softmax(op, scores, sink), value)


def repeat_heads(op: FusedNode, value: ir.Value, kv_heads: int, times: int, head_dim: int) -> ir.Value:
    """Repeat each head of `[batch, kv_heads, sequence, head_dim]` for the query heads that share it."""
    apart = op.reshape(value, 0, kv_heads, 1, -1, head_dim)
    repeated = op.Expand(apart, op.int64([1, 1, times, 1, 1]))
    return op.reshape(repeated, 0, kv_heads * times, -1, head_dim)


def score_scale(op: FusedNode, head_dim: int) -> float:
    """Return the attribute `scale` of the node, or by default 1 / sqrt(head_dim)."""
    return op.node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(head_dim)


def causal_mask(op: FusedNode, window: int = 0) -> ir.Value:
    """Add a causal mask, `[S, T]`, of a sliding window of so many keys if it is not 0."""
    key = op.positions()
    query = op.reshape(key, -1, 1)
    causal = op.Not(op.Less(query, key))
    return op.And(causal, op.Less(op.Sub(query, key), op.int64(window))) if window else causal


def _softmax(op: FusedNode, scores: ir.Value, sink: ir.Value | None) -> ir.Value:
    if sink is None:
        return op.Softmax(scores, axis=3)
    largest = op.Max(op.with_axes("ReduceMax", scores, [3]), sink)
    exponentials = op.Exp(op.Sub(scores, largest))
    of_sink = op.Exp(op.Sub(sink, largest))
    return op.Div(exponentials, op.Add(op.with_axes("ReduceSum", exponentials, [3]), of_sink))
