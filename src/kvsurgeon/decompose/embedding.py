"""`EmbedLayerNormalization` and its quantised twin: rows of tables, added and normed."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from kvsurgeon.decompose.node_builder import Pen

Parameter = Callable[[int], "ir.Value | None"]  # a weight by the index of its input, as floats
MASK, POSITIONS = 7, 8


def embed_layer_normalization(pen: Pen) -> None:
    """Write `EmbedLayerNormalization` out."""
    _write(pen, pen.given, lambda rows, _: rows, pen.given(POSITIONS))


def quantised_embed_layer_normalization(pen: Pen) -> None:
    """Write `QEmbedLayerNormalization` out: each table and weight has a scale and a zero point behind it."""

    def in_floats(value: ir.Value, index: int) -> ir.Value:
        scale, zero = pen.need(index + 6), pen.need(index + 11)
        return pen.node_of("DequantizeLinear", [value, scale, zero])

    def parameter(index: int) -> ir.Value | None:
        value = pen.given(index)
        return value if value is None or index in TABLES else in_floats(value, index)

    _write(pen, parameter, in_floats, None)


TABLES = (2, 3, 4)  # of words, of positions and of segments


def _write(
    pen: Pen, parameter: Parameter, in_floats: Callable[[ir.Value, int], ir.Value], positions: ir.Value | None
) -> None:
    picks = [pen.need(0), pen.positions() if positions is None else positions, pen.given(1)]
    rows = [
        in_floats(pen.node_of("Gather", [table, pick], axis=0), index)
        for index, pick in zip(TABLES, picks, strict=True)
        if pick is not None and (table := parameter(index)) is not None
    ]
    total = rows[0]
    for more in rows[1:]:
        total = pen.node_of("Add", [total, more])
    epsilon = pen.node.attributes.get_float("epsilon", 1e-12)
    normed = pen.node_of("LayerNormalization", [total, parameter(5), parameter(6)], axis=-1, epsilon=epsilon)
    pen.finish(normed, _counted(pen), total)


def _counted(pen: Pen) -> ir.Value | None:
    """How many tokens each text has, [batch]; None where nobody asks."""
    mask = pen.given(MASK)
    asked = len(pen.node.outputs) > 1 and (pen.node.outputs[1].uses() or pen.node.outputs[1].is_graph_output())
    if mask is None or not asked:
        return None
    if pen.graph.opset_imports.get("", 1) < 13:
        return pen.node_of("ReduceSum", [mask], axes=[1], keepdims=0)
    return pen.node_of("ReduceSum", [mask, pen.integers([1])], keepdims=0)
