"""`Attention` and `QAttention` of com.microsoft: projections, heads, masks and products in one node."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.decompose.node_builder import Pen
from kvsurgeon.decompose.padding_masks import padding
from kvsurgeon.decompose.softmax_attention import Scoring, attended, not_behind, usual_scale


def attention(pen: Pen) -> None:
    """Write `Attention` out.

    Raises:
        UnsupportedError: It has a past, turns queries and keys, or is masked in a way that is not known.
    """
    made = pen.node_of("MatMul", [pen.need(0), pen.need(1)])
    _write(pen, made, mask=3, bias=5, past=(4, 6))


def quantised_attention(pen: Pen) -> None:
    """Write `QAttention` out.

    Raises:
        UnsupportedError: As `attention`.
    """
    zeros = [pen.given(6), pen.given(7)]
    operands = [pen.need(0), pen.need(1), *zeros][: 4 if zeros[1] else 3 if zeros[0] else 2]
    summed = pen.node_of("MatMulInteger", operands)
    scale = pen.node_of("Mul", [pen.need(3), pen.need(4)])
    made = pen.node_of("Mul", [pen.node_of("Cast", [summed], to=pen.dtype), scale])
    _write(pen, made, mask=5, bias=-1, past=(8,))


def _write(pen: Pen, made: ir.Value, *, mask: int, bias: int, past: tuple[int, ...]) -> None:
    heads = pen.node.attributes.get_int("num_heads", 0)
    if any(pen.given(index) is not None for index in past):
        raise pen.refused("the model already has a cache", "inject a model exported without one")
    if pen.node.attributes.get_int("do_rotary", 0) or not heads:
        raise pen.refused("it turns queries and keys itself", "export with rotary positions of their own")
    added = pen.given(2)
    made = made if added is None else pen.node_of("Add", [made, added])
    widths = _widths(pen)
    query, key, value = (pen.heads_apart(part, heads) for part in pen.split(made, widths, axis=2))
    causal = bool(pen.node.attributes.get_int("unidirectional", 0))
    scoring = Scoring(
        scale=usual_scale(pen, widths[0] // heads), added=(pen.given(bias), padding(pen, mask, causal=causal)),
        seen=not_behind(pen) if causal else None,
    )  # fmt: skip
    pen.finish(pen.heads_together(attended(pen, query, key, value, scoring)))


def _widths(pen: Pen) -> list[int]:
    given = pen.node.attributes.get_ints("qkv_hidden_sizes", None)
    if given:
        return list(given)
    width = pen.width(1)
    if width % 3:
        raise pen.refused("the width of its weights is not that of queries, keys and values", "qkv_hidden_sizes")
    return [width // 3] * 3
