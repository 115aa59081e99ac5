"""`GroupQueryAttention` of com.microsoft: heads that share keys and values, positions, masks and products in one node.

Its inputs say how many tokens each text has. Where there is no past these are the call's own: token i is the one at
place i, and sees none behind it, be it padding or not.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.decompose.node_builder import Pen
from kvsurgeon.decompose.padding_masks import PADDED_BEHIND
from kvsurgeon.decompose.softmax_attention import Scoring, attended, not_behind, repeated, usual_scale
from kvsurgeon.symbolic import dimension as dim

PAST_KEY, PAST_VALUE, ENDS, COS, SIN, POSITIONS, BIAS, SINK, QUERY_NORM, KEY_NORM = 3, 4, 5, 7, 8, 9, 10, 11, 14, 15


def group_query_attention(pen: Pen) -> None:
    """Write `GroupQueryAttention` out.

    Raises:
        UnsupportedError: It has a past, or keeps keys and values in fewer bits.
    """
    if pen.given(PAST_KEY) is not None or pen.given(PAST_VALUE) is not None:
        raise pen.refused("the model already has a cache", "inject a model exported without one")
    attributes = pen.node.attributes
    if any(attributes.get_string(f"{kind}_quant_type", "NONE") != "NONE" for kind in "kv"):
        raise pen.refused("it keeps keys and values in fewer bits", "export with a cache in floats")
    _check_ends(pen)
    heads, kv_heads = (attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    packed = pen.given(1) is None
    head_dim = pen.width(0) // (heads + 2 * kv_heads if packed else heads)
    widths = [count * head_dim for count in (heads, kv_heads, kv_heads)]
    parts = pen.split(pen.need(0), widths, axis=2) if packed else [pen.need(index) for index in range(3)]
    query, key, value = (
        pen.heads_apart(part, count) for part, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
    )
    query, key = _normed(pen, query, QUERY_NORM), _normed(pen, key, KEY_NORM)
    if attributes.get_int("do_rotary", 0):
        turning = _turning(pen)
        query, key = (turned(pen, one, turning, head_dim) for one in (query, key))
    if heads != kv_heads:
        key, value = (repeated(pen, one, kv_heads, heads // kv_heads, head_dim) for one in (key, value))
    pen.assumed.add(PADDED_BEHIND)
    causal = attributes.get_int("causal", 1)
    scoring = Scoring(
        scale=usual_scale(pen, head_dim), softcap=attributes.get_float("softcap", 0.0), added=(pen.given(BIAS),),
        seen=not_behind(pen, max(0, attributes.get_int("local_window_size", -1))) if causal else None, sink=_sink(pen),
    )  # fmt: skip
    pen.finish(pen.heads_together(attended(pen, query, key, value, scoring)))


def _check_ends(pen: Pen) -> None:
    """See that texts are not said to end before the call does, where that can be told without a mask.

    Raises:
        UnsupportedError: They are: tokens would be masked whatever is given.
    """
    ends, hidden = pen.fact(ENDS).value, pen.fact(0).shape
    if ends is None or hidden is None:
        return
    last = dim.subtract(hidden[1], 1)
    for end in ends.reshape(-1):
        if not dim.is_equal(end, last):
            raise pen.refused("texts are said to end elsewhere than the call does", f"seqlens_k of {last}, not {end}")


def _normed(pen: Pen, value: ir.Value, place: int) -> ir.Value:
    """Each head divided by the root of its mean square, and scaled."""
    weight = pen.given(place)
    if weight is None:
        return value
    epsilon = pen.number(pen.node.attributes.get_float("qk_norm_epsilon", 1e-6))
    mean = pen.node_of("ReduceMean", [pen.node_of("Mul", [value, value]), *_last_axis(pen)], **_last_attribute(pen))
    root = pen.node_of("Sqrt", [pen.node_of("Add", [mean, epsilon])])
    return pen.node_of("Mul", [pen.node_of("Div", [value, root]), weight])


def _last_axis(pen: Pen) -> list[ir.Value]:
    return [] if pen.graph.opset_imports.get("", 1) < 18 else [pen.integers([-1])]


def _last_attribute(pen: Pen) -> dict[str, list[int]]:
    return {"axes": [-1]} if pen.graph.opset_imports.get("", 1) < 18 else {}


@dataclass(frozen=True, kw_only=True)
class Turning:
    """By what features are turned, pair by pair.

    Attributes:
        cos: [.., sequence, pairs].
        sin: The same.
        pairs: How many pairs are turned; what is behind them stays.
        interleaved: Whether a pair lies side by side, and not half a width apart.
    """

    cos: ir.Value
    sin: ir.Value
    pairs: int
    interleaved: bool


def _turning(pen: Pen) -> Turning:
    cos, sin = pen.need(COS), pen.need(SIN)
    places = pen.given(POSITIONS)
    rows = [pen.node_of("Gather", [table, places or pen.positions()], axis=0) for table in (cos, sin)]
    if places is not None:
        rows = [_before_heads(pen, one) for one in rows]
    return Turning(
        cos=rows[0], sin=rows[1], pairs=pen.width(COS),
        interleaved=bool(pen.node.attributes.get_int("rotary_interleaved", 0)),
    )  # fmt: skip


def _before_heads(pen: Pen, rows: ir.Value) -> ir.Value:
    """[batch, sequence, pairs] as [batch, 1, sequence, pairs]."""
    if pen.graph.opset_imports.get("", 1) < 13:
        return pen.node_of("Unsqueeze", [rows], axes=[1])
    return pen.node_of("Unsqueeze", [rows, pen.integers([1])])


def turned(pen: Pen, value: ir.Value, by: Turning, head_dim: int) -> ir.Value:
    """Return [batch, heads, sequence, head_dim] with each pair of features turned."""
    whole = 2 * by.pairs
    if by.interleaved:
        left, right = pen.sliced(value, 0, whole, 3, step=2), pen.sliced(value, 1, whole, 3, step=2)
    else:
        left, right = pen.sliced(value, 0, by.pairs, 3), pen.sliced(value, by.pairs, whole, 3)
    turned_left = pen.node_of("Sub", [_product(pen, left, by.cos), _product(pen, right, by.sin)])
    turned_right = pen.node_of("Add", [_product(pen, left, by.sin), _product(pen, right, by.cos)])
    parts = [turned_left, turned_right]
    if by.interleaved:
        pairs = [pen.reshaped(part, 0, 0, 0, by.pairs, 1) for part in parts]
        parts = [pen.reshaped(pen.node_of("Concat", pairs, axis=4), 0, 0, 0, whole)]
    if whole < head_dim:
        parts.append(pen.sliced(value, whole, head_dim, 3))
    return parts[0] if len(parts) == 1 else pen.node_of("Concat", parts, axis=3)


def _product(pen: Pen, one: ir.Value, other: ir.Value) -> ir.Value:
    return pen.node_of("Mul", [one, other])


def _sink(pen: Pen) -> ir.Value | None:
    sink = pen.given(SINK)
    if sink is not None:
        return pen.reshaped(sink, 1, -1, 1, 1)
    return pen.number(0.0) if pen.node.attributes.get_int("smooth_softmax", 0) else None
