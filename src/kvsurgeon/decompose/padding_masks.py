"""Masks of fused attention, as numbers that are added to scores: [batch or 1, 1, sequence or 1, keys]."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.decompose.node_builder import Pen
from kvsurgeon.symbolic import dimension as dim

PADDED_BEHIND = (
    "an operator is told how many tokens a text has, as if padding stood behind them: before them it would be read"
)


def padding(pen: Pen, place: int, *, causal: bool) -> ir.Value | None:
    """Return what is added to scores where an input masks keys; None where it masks none that would be seen.

    Args:
        pen: Where it is written.
        place: Index of the input. [batch, keys] and [batch, sequence, keys] hold 1 where a key counts, and 0 elsewhere;
            [batch] holds the number of keys, and [2 * batch] first where they end and then where they begin.
        causal: Whether keys after the query are hidden anyway.

    Raises:
        UnsupportedError: It is of another form.
    """
    mask = pen.given(place)
    if mask is None:
        return None
    if pen.rank(place) == 1:
        seen = _between(pen, mask, place, causal=causal)
    elif pen.rank(place) in (2, 3):
        seen = pen.node_of("Greater", [mask, pen.number(0, pen.fact(place).dtype)])
        seen = pen.reshaped(seen, 0, 1, 1, -1) if pen.rank(place) == 2 else _beside_heads(pen, seen)
    else:
        raise pen.refused("its mask is of a form that is not known", "a mask [batch, sequence], 1 where one counts")
    if seen is None:
        return None
    filtered = pen.node.attributes.get_float("mask_filter_value", -10000.0)
    return pen.node_of("Where", [seen, pen.number(0), pen.number(filtered)])


def _between(pen: Pen, mask: ir.Value, place: int, *, causal: bool) -> ir.Value | None:
    """Whether a key lies before the end of its text, and behind its beginning.

    Where keys after the query are hidden, no token of the text sees one behind its end.
    """
    size, batch = (pen.fact(place).shape or (None,))[0], (pen.fact(0).shape or (None,))[0]
    known = size is not None and batch is not None
    doubled = known and dim.is_equal(size, dim.multiply(2, batch))
    if not doubled and not (known and dim.is_equal(size, batch)):
        raise pen.refused("its mask is of a form that is not known", "a mask [batch, sequence], 1 where one counts")
    numbers = pen.node_of("Cast", [mask], to=ir.DataType.INT64)
    row, seen = pen.positions(), None
    if doubled:
        pairs = pen.reshaped(numbers, 2, -1, 1, 1, 1)
        ends, begins = (_part(pen, pairs, part) for part in (0, 1))
        seen = pen.node_of("Not", [pen.node_of("Less", [row, begins])])
    else:
        ends = pen.reshaped(numbers, -1, 1, 1, 1)
    if causal:
        pen.assumed.add(PADDED_BEHIND)
        return seen
    before = pen.node_of("Less", [row, ends])
    return before if seen is None else pen.node_of("And", [seen, before])


def _part(pen: Pen, pairs: ir.Value, part: int) -> ir.Value:
    return pen.node_of("Gather", [pairs, pen.integers(part)], axis=0)


def _beside_heads(pen: Pen, mask: ir.Value) -> ir.Value:
    """[batch, sequence, keys] as [batch, 1, sequence, keys]."""
    if pen.graph.opset_imports.get("", 1) < 13:
        return pen.node_of("Unsqueeze", [mask], axes=[1])
    return pen.node_of("Unsqueeze", [mask, pen.integers([1])])
