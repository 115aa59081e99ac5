"""`Attention` of ONNX, where it says more than queries, keys, values and a mask."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.decompose.node_builder import Pen
from kvsurgeon.decompose.softmax_attention import Scoring, attended, repeated, usual_scale
from kvsurgeon.graph.query import depends_on_input

MASK, PAST_KEY, PAST_VALUE, KEYS_THAT_COUNT = 3, 4, 5, 6


def says_more(node: ir.Node) -> bool:
    """Whether it counts keys, has some of its own, or what it makes of keys and values is read.

    A past is refused by whoever follows it.
    """
    past = any(index < len(node.inputs) and node.inputs[index] is not None for index in (PAST_KEY, PAST_VALUE))
    counts = len(node.inputs) > KEYS_THAT_COUNT and node.inputs[KEYS_THAT_COUNT] is not None
    read = any(value.uses() or value.is_graph_output() for value in node.outputs[1:3])
    return not past and (counts or read or _has_own_keys(node))


def _has_own_keys(node: ir.Node) -> bool:
    """Whether rows that come from no input are joined to the keys: it has more of them than queries then."""
    join = None if node.inputs[1] is None else node.inputs[1].producer()
    if join is None or join.op_type != "Concat" or join.attributes.get_int("axis", 0) not in (2, -2):
        return False
    given = [value for value in join.inputs if value is not None and depends_on_input(value)]
    return len(given) == 1 < len(join.inputs) and not node.attributes.get_int("is_causal", 0)


def standard_attention(pen: Pen) -> None:
    """Write `Attention` out.

    Raises:
        UnsupportedError: Its scores or weights are read.
    """
    attributes, four = pen.node.attributes, pen.rank(0) == 4
    counts = [attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    if four:
        counts = [pen.width(index, 1) for index in range(3)]
    heads, kv_heads, _ = counts
    parts = [pen.need(index) for index in range(3)]
    query, key, value = (
        part if four else pen.heads_apart(part, count) for part, count in zip(parts, counts, strict=True)
    )
    head_dims = [pen.width(index) // (1 if four else count) for index, count in enumerate(counts)]
    wide_key, wide_value = key, value
    if heads != kv_heads:
        times = heads // kv_heads
        wide_key, wide_value = (
            repeated(pen, one, kv_heads, times, head_dim)
            for one, head_dim in ((key, head_dims[1]), (value, head_dims[2]))
        )
    scoring = Scoring(
        scale=usual_scale(pen, head_dims[0]), softcap=attributes.get_float("softcap", 0.0), added=(_mask(pen),),
        seen=_seen(pen, axis=2 if four else 1),
    )  # fmt: skip
    result = attended(pen, query, wide_key, wide_value, scoring)
    pen.finish(result if four else pen.heads_together(result), key, value)


def _mask(pen: Pen) -> ir.Value | None:
    mask = pen.given(MASK)
    if mask is None or pen.fact(MASK).dtype is not ir.DataType.BOOL:
        return mask
    return pen.node_of("Where", [mask, pen.number(0), pen.lowest()])


def _seen(pen: Pen, axis: int) -> ir.Value | None:
    """Which keys are seen, [batch or 1, 1, sequence, keys]: those that count, and where it is causal none behind.

    The last query stands at the last key that counts.
    """
    count = pen.given(KEYS_THAT_COUNT)
    causal = pen.node.attributes.get_int("is_causal", 0)
    ends = None if count is None else pen.reshaped(count, -1, 1, 1, 1)
    row = pen.positions(axis)
    seen = None if ends is None else pen.node_of("Less", [row, ends])
    if not causal:
        return seen
    column = pen.reshaped(row, -1, 1)
    if ends is not None:
        length = pen.length(axis)
        column = pen.node_of("Add", [column, pen.node_of("Sub", [ends, length])])
    behind = pen.node_of("Not", [pen.node_of("Less", [column, row])])
    return behind if seen is None else pen.node_of("And", [seen, behind])
