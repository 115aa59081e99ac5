"""From queries, keys and values of several heads to what the heads have seen, in standard operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from kvsurgeon.decompose.node_builder import Pen


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How scores become weights, in this order.

    Attributes:
        scale: What they are multiplied with.
        softcap: Bound that they are bent to; none where it is 0.
        added: What is added to them, each [.., .., sequence, keys].
        seen: Whether a query sees a key, [.., .., sequence, keys]; all where it is None.
        sink: Scores that nothing is behind, [1, heads, 1, 1].
    """

    scale: float
    softcap: float = 0.0
    added: Sequence[ir.Value | None] = field(default_factory=tuple)
    seen: ir.Value | None = None
    sink: ir.Value | None = None


def attended(pen: Pen, query: ir.Value, key: ir.Value, value: ir.Value, scoring: Scoring) -> ir.Value:
    """Return what each head has seen, [batch, heads, sequence, head_dim].

    Args:
        pen: Where it is written.
        query: [batch, heads, sequence, head_dim].
        key: [batch, heads, keys, head_dim].
        value: [batch, heads, keys, head_dim].
        scoring: How scores become weights.
    """
    scores = pen.node_of("MatMul", [query, pen.node_of("Transpose", [key], perm=[0, 1, 3, 2])])
    scores = pen.node_of("Mul", [scores, pen.number(scoring.scale)])
    if scoring.softcap:
        bound = pen.number(scoring.softcap)
        scores = pen.node_of("Mul", [pen.node_of("Tanh", [pen.node_of("Div", [scores, bound])]), bound])
    for added in scoring.added:
        scores = scores if added is None else pen.node_of("Add", [scores, added])
    if scoring.seen is not None:
        scores = pen.node_of("Where", [scoring.seen, scores, pen.lowest()])
    return pen.node_of("MatMul", [_weights(pen, scores, scoring.sink), value])


def repeated(pen: Pen, value: ir.Value, kv_heads: int, times: int, head_dim: int) -> ir.Value:
    """Each head of [batch, kv_heads, sequence, head_dim] as often as queries share it."""
    apart = pen.reshaped(value, 0, kv_heads, 1, -1, head_dim)
    again = pen.node_of("Expand", [apart, pen.integers([1, 1, times, 1, 1])])
    return pen.reshaped(again, 0, kv_heads * times, -1, head_dim)


def usual_scale(pen: Pen, head_dim: int) -> float:
    """The scale that the node states, or that of heads of this width."""
    return pen.node.attributes.get_float("scale", 0.0) or 1.0 / math.sqrt(head_dim)


def not_behind(pen: Pen, window: int = 0) -> ir.Value:
    """Write whether a key is not after the query, [sequence, keys], and one of so many where there is a window."""
    row = pen.positions()
    column = pen.reshaped(row, -1, 1)
    seen = pen.node_of("Not", [pen.node_of("Less", [column, row])])
    if not window:
        return seen
    away = pen.node_of("Sub", [column, row])
    return pen.node_of("And", [seen, pen.node_of("Less", [away, pen.integers(window)])])


def _weights(pen: Pen, scores: ir.Value, sink: ir.Value | None) -> ir.Value:
    if sink is None:
        return pen.node_of("Softmax", [scores], axis=3)
    largest = pen.node_of("Max", [_along_keys(pen, "ReduceMax", scores), sink])
    raised = pen.node_of("Exp", [pen.node_of("Sub", [scores, largest])])
    beside = pen.node_of("Exp", [pen.node_of("Sub", [sink, largest])])
    return pen.node_of("Div", [raised, pen.node_of("Add", [_along_keys(pen, "ReduceSum", raised), beside])])


def _along_keys(pen: Pen, operator: str, value: ir.Value) -> ir.Value:
    opset = pen.graph.opset_imports.get("", 1)
    if opset < (13 if operator == "ReduceSum" else 18):
        return pen.node_of(operator, [value], axes=[3])
    return pen.node_of(operator, [value, pen.integers([3])])
