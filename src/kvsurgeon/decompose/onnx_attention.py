"""`Attention` of ONNX, if it does more than softmax attention of queries, keys and values with a mask."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.decompose.fused_node import FusedNode
from kvsurgeon.decompose.softmax_attention import repeat_heads, score_scale, softmax_attention
from kvsurgeon.graph.query import is_operator, producer_of
from kvsurgeon.ops.content import depends_on_input

MASK, PAST_KEY, PAST_VALUE, KEY_COUNT = 3, 4, 5, 6


def needs_decomposition(node: ir.Node) -> bool:
    """Return whether a node is `Attention` with a number of keys, learned key rows, or further outputs in use.

    Analysis reads it as it is otherwise, and rejects a past.
    """
    if not is_operator(node, "Attention"):
        return False
    inputs = {index for index, value in enumerate(node.inputs) if value is not None}
    used = any(value.uses() or value.is_graph_output() for value in node.outputs[1:3])
    return not inputs & {PAST_KEY, PAST_VALUE} and (KEY_COUNT in inputs or used or _has_learned_keys(node))


def _has_learned_keys(node: ir.Node) -> bool:
    """Whether rows that come from no input are concatenated to the keys, so that there are more keys than queries."""
    concat = producer_of(node.inputs[1], "Concat")
    if concat is None or concat.attributes.get_int("axis", 0) not in (2, -2):
        return False
    computed = [value for value in concat.inputs if value is not None and depends_on_input(value)]
    return len(computed) == 1 < len(concat.inputs) and not node.attributes.get_int("is_causal", 0)


def onnx_attention(op: FusedNode) -> None:
    """Decompose `Attention`.

    Raises:
        UnsupportedError: Its scores or weights are used.
    """
    attributes, has_heads = op.node.attributes, op.rank(0) == 4
    counts = [attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    if has_heads:
        counts = [op.size(index, 1) for index in range(3)]
    heads, kv_heads, _ = counts
    parts = [op.input(index) for index in range(3)]
    query, key, value = (
        part if has_heads else op.split_heads(part, count) for part, count in zip(parts, counts, strict=True)
    )
    head_dims = [op.size(index) // (1 if has_heads else count) for index, count in enumerate(counts)]
    keys, values = key, value
    if heads != kv_heads:
        keys, values = (
            repeat_heads(op, part, kv_heads, heads // kv_heads, head_dim)
            for part, head_dim in ((key, head_dims[1]), (value, head_dims[2]))
        )
    bias = _bias(op)
    mask = _visible(op, axis=2 if has_heads else 1)
    result = softmax_attention(
        op, query, keys, values, scale=score_scale(op, head_dims[0]), softcap=attributes.get_float("softcap", 0.0),
        biases=[bias], mask=mask,
    )  # fmt: skip
    op.finish(result if has_heads else op.merge_heads(result), key, value)


def _bias(op: FusedNode) -> ir.Value | None:
    mask = op.optional(MASK)
    if mask is None or op.fact(MASK).dtype is not ir.DataType.BOOL:
        return mask
    return op.Where(mask, op.number(0), op.lowest())


def _visible(op: FusedNode, axis: int) -> ir.Value | None:
    """Add whether a query attends to a key, `[batch or 1, 1, S, T]`: to the first `KEY_COUNT`, and causally if so.

    The last query is at the position of the last of these keys.
    """
    count = op.optional(KEY_COUNT)
    ends = None if count is None else op.reshape(count, -1, 1, 1, 1)
    keys = op.positions(axis)
    visible = None if ends is None else op.Less(keys, ends)
    if not op.flag("is_causal"):
        return visible
    queries = op.reshape(keys, -1, 1)
    if ends is not None:
        length = op.sequence_length(axis)
        queries = op.Add(queries, op.Sub(ends, length))
    causal = op.Not(op.Less(queries, keys))
    return causal if visible is None else op.And(visible, causal)
