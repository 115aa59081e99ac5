"""`EmbedLayerNormalization` and `QEmbedLayerNormalization`: sum of embeddings, then layer normalization."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from kvsurgeon.decompose.fused_node import FusedNode

TABLES = (2, 3, 4)  # embeddings of tokens, positions and segments
GAMMA, BETA, MASK, POSITIONS = 5, 6, 7, 8


def embed_layer_normalization(op: FusedNode) -> None:
    """Decompose `EmbedLayerNormalization`."""
    _decompose(op, op.optional(POSITIONS), lambda value, _: value)


def quantized_embed_layer_normalization(op: FusedNode) -> None:
    """Decompose `QEmbedLayerNormalization`: each table and weight has a scale and a zero point."""

    def dequantize(value: ir.Value, index: int) -> ir.Value:
        scale, zero_point = op.input(index + 6), op.input(index + 11)
        return op.DequantizeLinear(value, scale, zero_point)

    _decompose(op, None, dequantize)


def _decompose(op: FusedNode, positions: ir.Value | None, dequantize: Callable[[ir.Value, int], ir.Value]) -> None:
    """Write the node with `dequantize(value, input index)` for rows of tables and for weights."""
    indices = [op.input(0), op.positions() if positions is None else positions, op.optional(1)]
    rows = [
        dequantize(op.Gather(table, index, axis=0), place)
        for place, index in zip(TABLES, indices, strict=True)
        if index is not None and (table := op.optional(place)) is not None
    ]
    total = rows[0]
    for row in rows[1:]:
        total = op.Add(total, row)
    epsilon = op.node.attributes.get_float("epsilon", 1e-12)
    weights = (None if (value := op.optional(place)) is None else dequantize(value, place) for place in (GAMMA, BETA))
    normalized = op.LayerNormalization(total, *weights, axis=-1, epsilon=epsilon)
    op.finish(normalized, _token_counts(op), total)


def _token_counts(op: FusedNode) -> ir.Value | None:
    """Add the number of tokens of each sequence, `[batch]`; None if the output is unused."""
    mask = op.optional(MASK)
    used = len(op.node.outputs) > 1 and (op.node.outputs[1].uses() or op.node.outputs[1].is_graph_output())
    return op.with_axes("ReduceSum", mask, [1], keepdims=0) if mask is not None and used else None
