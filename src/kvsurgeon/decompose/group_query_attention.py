"""`GroupQueryAttention` of com.microsoft: grouped heads, rotary embedding, mask and products in one node.

Its inputs state the length of each sequence. Without a past these are the lengths of the call: token i is at position
i and attends to nothing after it, padding or not.
"""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.decompose.fused_node import FusedNode
from kvsurgeon.decompose.softmax_attention import causal_mask, repeat_heads, score_scale, softmax_attention

PAST_KEY, PAST_VALUE, LAST_POSITIONS, COS, SIN, POSITIONS, BIAS, SINK = 3, 4, 5, 7, 8, 9, 10, 11
QUERY_NORM, KEY_NORM, QUERY_LENGTHS = 14, 15, 16


def group_query_attention(op: FusedNode) -> None:
    """Decompose `GroupQueryAttention`.

    Raises:
        UnsupportedError: It has a past, or a quantized cache.
    """
    if op.optional(PAST_KEY) is not None or op.optional(PAST_VALUE) is not None:
        raise op.unsupported_past()
    if op.optional(QUERY_LENGTHS) is not None:
        raise op.unsupported(
            "number of new tokens for each sequence", expected="as many for all",
            hint="add-query-lengths comes last, after all passes that examine attention",
        )  # fmt: skip
    attributes = op.node.attributes
    quantized = [attributes.get_string(f"{kind}_quant_type", "NONE") for kind in "kv"]
    if quantized != ["NONE", "NONE"]:
        raise op.unsupported("quantized KV cache", found=", ".join(quantized), hint="quantize-cache comes last")
    heads, kv_heads = (attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    packed = op.optional(1) is None
    head_dim = op.size(0) // (heads + 2 * kv_heads if packed else heads)
    counts = (heads, kv_heads, kv_heads)
    widths = [count * head_dim for count in counts]
    parts = op.split(op.input(0), widths, axis=2) if packed else [op.input(index) for index in range(3)]
    query, key, value = (op.split_heads(part, count) for part, count in zip(parts, counts, strict=True))
    query, key = _normalize(op, query, QUERY_NORM), _normalize(op, key, KEY_NORM)
    if op.flag("do_rotary"):
        cos, sin = _rotary_tables(op)
        query, key = (rotary_embedding(op, part, cos, sin, op.size(COS), head_dim) for part in (query, key))
    if heads != kv_heads:
        key, value = (repeat_heads(op, part, kv_heads, heads // kv_heads, head_dim) for part in (key, value))
    op.assume_right_padding(op.input(LAST_POSITIONS), missing=1, exact=True)
    window = max(0, attributes.get_int("local_window_size", -1))
    mask = causal_mask(op, window) if attributes.get_int("causal", 1) else None
    result = softmax_attention(
        op, query, key, value, scale=score_scale(op, head_dim), softcap=attributes.get_float("softcap", 0.0),
        biases=[op.optional(BIAS)], mask=mask, sink=_sink(op),
    )  # fmt: skip
    op.finish(op.merge_heads(result))


def _normalize(op: FusedNode, value: ir.Value, index: int) -> ir.Value:
    """Apply RMS normalization to each head, if the input of its weight is given."""
    weight = op.optional(index)
    if weight is None:
        return value
    epsilon = op.number(op.node.attributes.get_float("qk_norm_epsilon", 1e-6))
    mean = op.with_axes("ReduceMean", op.Mul(value, value), [-1])
    return op.Mul(op.Div(value, op.Sqrt(op.Add(mean, epsilon))), weight)


def _rotary_tables(op: FusedNode) -> list[ir.Value]:
    """Return the cosines and sines at the positions of the tokens, `[S, pairs]` or `[batch, 1, S, pairs]`."""
    positions = op.optional(POSITIONS)
    tables = [op.Gather(table, positions or op.positions(), axis=0) for table in (op.input(COS), op.input(SIN))]
    return tables if positions is None else [op.with_axes("Unsqueeze", table, [1]) for table in tables]


def rotary_embedding(
    op: FusedNode, value: ir.Value, cos: ir.Value, sin: ir.Value, pairs: int, head_dim: int
) -> ir.Value:
    """Rotate pairs of features of `[batch, heads, sequence, head_dim]`; features after the pairs stay unchanged.

    A pair is two neighbors if the attribute `rotary_interleaved` is set, and half the rotated width apart otherwise.
    """
    width, interleaved = 2 * pairs, op.flag("rotary_interleaved")
    if interleaved:
        left, right = op.slice(value, 0, width, 3, step=2), op.slice(value, 1, width, 3, step=2)
    else:
        left, right = op.slice(value, 0, pairs, 3), op.slice(value, pairs, width, 3)
    parts = [op.Sub(op.Mul(left, cos), op.Mul(right, sin)), op.Add(op.Mul(left, sin), op.Mul(right, cos))]
    if interleaved:
        columns = [op.reshape(part, 0, 0, 0, pairs, 1) for part in parts]
        parts = [op.reshape(op.Concat(*columns, axis=4), 0, 0, 0, width)]
    if width < head_dim:
        parts.append(op.slice(value, width, head_dim, 3))
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=3)


def _sink(op: FusedNode) -> ir.Value | None:
    sink = op.optional(SINK)
    if sink is not None:
        return op.reshape(sink, 1, -1, 1, 1)
    return op.number(0.0) if op.flag("smooth_softmax") else None
