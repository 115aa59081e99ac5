"""Operators that pass a state from token to token."""

from __future__ import annotations

import math

from kvsurgeon.ops.operator import AxisLinks, Labels, Operator, Trait, entries, parameters
from kvsurgeon.ops.schema import by_schema
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.fact import Fact, OperatorCall, axis_of


def linear_attention(call: OperatorCall) -> list[Fact]:
    """`LinearAttention`: [batch, sequence, q_heads * value_dim] and the state [batch, kv_heads, key_dim, value_dim]."""
    query, key, value = (call.fact(index) for index in range(3))
    if query.shape is None or key.shape is None or value.shape is None:
        return [Fact(None, query.dtype)] * 2
    heads, kv_heads = call.integer("q_num_heads", 1), call.integer("kv_num_heads", 1)
    key_dim, value_dim = (dim.exact_quotient(fact.shape[2], kv_heads) for fact in (key, value) if fact.shape)
    key_dim, value_dim = (call.unknown() if size is None else size for size in (key_dim, value_dim))
    return [
        Fact((*query.shape[:2], dim.multiply(heads, value_dim)), query.dtype),
        Fact((query.shape[0], kv_heads, key_dim, value_dim), query.dtype),
    ]


def linear_attention_links(call: OperatorCall) -> AxisLinks:
    """`LinearAttention`: a token depends on those before it; queries, keys, values, decay and beta have its axes."""
    tokens: Labels = ("batch", "sequence", None)
    inputs = list(parameters(call, tokens, tokens, tokens))
    inputs[4:6] = [tokens if call.given(index) is not None else None for index in range(4, len(inputs))]
    return AxisLinks(
        inputs=tuple(inputs), outputs=(tokens, ("batch", None, None, None)), mixed=frozenset({"sequence"}),
        windows={"sequence": (-math.inf, 0)},
    )  # fmt: skip


def causal_conv_with_state(call: OperatorCall) -> list[Fact]:
    """`CausalConvWithState`: its input's shape, and the rows before the next call."""
    rows = call.fact(0)
    return [Fact(rows.shape, rows.dtype), Fact(None, rows.dtype)]


def scan(call: OperatorCall) -> list[Fact]:
    """`Scan`: states as they are before the first element, and the declared rows of the body, one for each element."""
    body, elements = call.node.attributes["body"].as_graph(), call.integer("num_scan_inputs", 1)
    states = len(call.inputs) - elements
    axes = call.attribute("scan_output_axes") or [0] * (len(body.outputs) - states)
    axis_in = next(iter(call.attribute("scan_input_axes") or [0]))
    source = call.fact(states).shape
    if source is None:
        return by_schema(call)
    facts = [Fact(call.fact(index).shape, call.fact(index).dtype) for index in range(states)]
    for row, axis in zip(body.outputs[states:], axes, strict=True):
        if row.shape is None or not row.shape.is_static():
            return by_schema(call)
        sizes = list(row.shape.numpy())
        place = axis_of(axis, len(sizes) + 1)
        facts.append(Fact((*sizes[:place], source[axis_of(axis_in, len(source))], *sizes[place:]), row.dtype))
    return facts


OPERATORS: list[Operator] = [
    *entries("LSTM GRU RNN", by_schema, None, Trait.RECURRENT),
    *entries("Scan", scan, None, Trait.RECURRENT),
    *entries("CausalConvWithState", causal_conv_with_state, domain="com.microsoft",
             decomposition="kvsurgeon.decompose.causal_convolutions:causal_conv_with_state"),
    *entries("LinearAttention", linear_attention, linear_attention_links, since_version=27, state=(3, 1)),
]  # fmt: skip
