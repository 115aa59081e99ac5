"""`MultiHeadAttention` of com.microsoft: heads, masks and products in one node, behind projections of their own."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.decompose.node_builder import Pen
from kvsurgeon.decompose.padding_masks import padding
from kvsurgeon.decompose.softmax_attention import Scoring, attended, not_behind, usual_scale

PAST = (6, 7, 8, 9)


def multi_head_attention(pen: Pen) -> None:
    """Write `MultiHeadAttention` out.

    Raises:
        UnsupportedError: It has a past, or is masked in a way that is not known.
    """
    heads = pen.node.attributes.get_int("num_heads", 0)
    if any(pen.given(index) is not None for index in PAST):
        raise pen.refused("the model already has a cache", "inject a model exported without one")
    parts = _apart(pen, heads)
    head_dim = pen.width(0) if pen.rank(0) == 5 else pen.width(0) // heads
    query, key, value = (
        part if pen.rank(index) == 4 else pen.heads_apart(part, heads) for index, part in enumerate(parts)
    )
    causal = bool(pen.node.attributes.get_int("unidirectional", 0))
    added = (pen.given(5), padding(pen, 4, causal=causal))
    seen = not_behind(pen) if causal else None
    scoring = Scoring(scale=usual_scale(pen, head_dim), added=added, seen=seen)
    pen.finish(pen.heads_together(attended(pen, query, key, value, scoring)))


def _apart(pen: Pen, heads: int) -> Sequence[ir.Value]:
    """Queries, keys and values, each [batch, sequence, hidden], or [batch, heads, sequence, head_dim] as it was given.

    What is packed lies as [batch, sequence, heads, 3, head_dim], keys and values alone with a 2.
    """
    if pen.rank(0) == 5 and pen.given(1) is None and pen.given(2) is None:
        parts = _unpacked(pen, pen.need(0), 3)
        widths = [heads * pen.width(0)] * 3
    elif pen.rank(1) == 5 and pen.given(2) is None:
        parts = [pen.need(0), *_unpacked(pen, pen.need(1), 2)]
        widths = [pen.width(0)] * 3
    else:
        parts = [pen.need(index) for index in range(3)]
        widths = [pen.width(index) * (heads if pen.rank(index) == 4 else 1) for index in range(3)]
    bias = pen.given(3)
    if bias is None:
        return parts
    added = pen.split(bias, widths, axis=0)
    return [
        part if pen.rank(index) == 4 else pen.node_of("Add", [part, one])
        for index, (part, one) in enumerate(zip(parts, added, strict=True))
    ]


def _unpacked(pen: Pen, packed: ir.Value, parts: int) -> list[ir.Value]:
    return [pen.reshaped(part, 0, 0, -1) for part in pen.split(packed, [1] * parts, axis=3)]
