"""Operators that hold a whole attention or a whole embedding: `Attention`, `GroupQueryAttention` and their kin."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.ops.elementwise import same_as_first
from kvsurgeon.ops.operator import (
    AttentionInputs,
    AxisLinks,
    Operator,
    Trait,
    UntraceableAxesError,
    entries,
    identity_links,
    parameters,
    rank_of,
)
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.fact import Fact, OperatorCall


def attention(call: OperatorCall) -> list[Fact]:
    """`Attention` of opset 23 and later."""
    query, key, value = (call.fact(index) for index in range(3))
    outputs = [Fact(None, query.dtype)] * len(call.node.outputs)
    if query.shape is None or key.shape is None or value.shape is None:
        return outputs
    if len(query.shape) == 4:
        outputs[0] = Fact((*query.shape[:3], value.shape[3]), query.dtype)
    else:
        width = dim.exact_quotient(value.shape[2], call.integer("kv_num_heads", 1))
        heads = call.integer("q_num_heads", 1)
        outputs[0] = Fact(
            (*query.shape[:2], call.unknown() if width is None else dim.multiply(heads, width)), query.dtype
        )
    return outputs


def packed_attention(call: OperatorCall) -> list[Fact]:
    """`Attention` and `QAttention` of com.microsoft: [batch, sequence, hidden], floats if quantized."""
    hidden, weights = call.fact(0), call.fact(1)
    dtype = call.fact(3).dtype if call.node.op_type == "QAttention" else hidden.dtype
    outputs = [Fact(None, dtype)] * len(call.node.outputs)
    if hidden.shape is None or weights.shape is None:
        return outputs
    sizes = call.attribute("qkv_hidden_sizes")
    width: Dimension | None = sizes[2] if sizes else dim.exact_quotient(weights.shape[1], 3)
    outputs[0] = Fact((*hidden.shape[:2], call.unknown() if width is None else width), dtype)
    return outputs


def multi_head_attention(call: OperatorCall) -> list[Fact]:
    """`MultiHeadAttention` of com.microsoft: [batch, sequence, hidden], whatever its inputs are packed into."""
    query, value = call.fact(0), call.given(2) or call.fact(0)
    outputs = [Fact(None, query.dtype)] * len(call.node.outputs)
    if query.shape is None or value.shape is None:
        return outputs
    width = value.shape[2]
    if len(value.shape) == 4:  # [batch, heads, keys, head_dim]
        width = dim.multiply(value.shape[1], value.shape[3])
    elif len(value.shape) == 5:  # [batch, keys, heads, 2 or 3, head_dim]
        width = dim.multiply(value.shape[2], value.shape[4])
    outputs[0] = Fact((*query.shape[:2], width), query.dtype)
    return outputs


def group_query_attention(call: OperatorCall) -> list[Fact]:
    """`GroupQueryAttention` of com.microsoft: the query's shape, or the query's part of a packed one."""
    query = call.fact(0)
    outputs = [Fact(None, query.dtype)] * len(call.node.outputs)
    if query.shape is None or len(query.shape) != 3:
        return outputs
    width: Dimension = query.shape[2]
    if call.given(1) is None:
        heads, kv_heads = call.integer("num_heads", 1), call.integer("kv_num_heads", 1)
        head_dim = dim.exact_quotient(width, heads + 2 * kv_heads)
        width = call.unknown() if head_dim is None else dim.multiply(heads, head_dim)
    outputs[0] = Fact((*query.shape[:2], width), query.dtype)
    return outputs


def embedding(call: OperatorCall) -> list[Fact]:
    """`EmbedLayerNormalization` and its quantized twin: [batch, sequence, hidden], texts' lengths, and the sum."""
    ids, table = call.fact(0).shape, call.fact(2).shape
    scale = call.fact(8) if call.node.op_type == "QEmbedLayerNormalization" else call.fact(2)
    if ids is None or table is None:
        return [Fact(None, scale.dtype)] * len(call.node.outputs)
    rows = Fact((*ids, table[-1]), scale.dtype)
    return [rows, Fact(ids[:1], ir.DataType.INT32), rows]


def attention_links(call: OperatorCall) -> AxisLinks:
    """`Attention`: [batch, heads, sequence, head_dim] or [batch, sequence, hidden]."""
    four = rank_of(call, 0) == 4
    layout = ("batch", "kv_heads", "sequence", "head_dim") if four else ("batch", "sequence", "hidden")
    labels = identity_links(call)
    inputs = AttentionInputs(
        mask=3 if call.given(3) is not None else None, causal=bool(call.integer("is_causal", 0)), layout=layout,
        packed_heads=1 if four else call.integer("kv_num_heads", 1),
    )  # fmt: skip
    outputs = (labels,) * len(call.node.outputs)
    return AxisLinks(
        inputs=parameters(call, labels), outputs=outputs, sequence=layout.index("sequence"), attention=inputs
    )


def rotary_links(call: OperatorCall) -> AxisLinks:
    """`RotaryEmbedding`: the tables and the positions are aligned with the sequence axis of input 0."""
    labels = identity_links(call)
    sequence = 2 if len(labels) == 4 else 1
    microsoft = call.node.domain == "com.microsoft"
    place, tables = (1, (2, 3)) if microsoft else (3, (1, 2))
    several = call.node.op_type == "MRotaryEmbedding"  # positions [3, batch, sequence]
    inputs = list(parameters(call, labels))
    for index in (place, *tables):
        if not call.given(index):
            continue
        rank = rank_of(call, index)
        if index == place and rank < 2:
            raise UntraceableAxesError("its positions are one number for the whole call")
        if index == place or rank == 3:
            aligned = 2 if several and index == place else 1
            inputs[index] = tuple(sequence if axis == aligned else None for axis in range(rank))
    return AxisLinks(inputs=tuple(inputs), outputs=(labels,), sequence=sequence)


def experts_links(call: OperatorCall) -> AxisLinks:
    """`MoE`, `QMoE`: [tokens, hidden] or [batch, sequence, hidden], and scores [tokens, experts]."""
    labels = identity_links(call)
    return AxisLinks(inputs=parameters(call, labels, identity_links(call, 1)), outputs=(labels,), token_rows=True)


def projecting_attention_links(call: OperatorCall) -> AxisLinks:
    """`Attention` of com.microsoft is decomposed before axes are traced."""
    raise UntraceableAxesError("a fused attention that also projects is not supported")


_DECOMPOSE = "kvsurgeon.decompose"

OPERATORS: list[Operator] = [
    *entries("Attention", attention, attention_links,
             decomposition=f"{_DECOMPOSE}.onnx_attention:onnx_attention"),
    *entries("Attention", packed_attention, projecting_attention_links, domain="com.microsoft",
             decomposition=f"{_DECOMPOSE}.packed_attention:attention"),
    *entries("QAttention", packed_attention, domain="com.microsoft",
             decomposition=f"{_DECOMPOSE}.packed_attention:quantized_attention"),
    *entries("MultiHeadAttention", multi_head_attention, domain="com.microsoft",
             decomposition=f"{_DECOMPOSE}.multi_head_attention:multi_head_attention"),
    *entries("GroupQueryAttention", group_query_attention, domain="com.microsoft",
             decomposition=f"{_DECOMPOSE}.group_query_attention:group_query_attention"),
    *entries("EmbedLayerNormalization", embedding, domain="com.microsoft",
             decomposition=f"{_DECOMPOSE}.embedding:embed_layer_normalization"),
    *entries("QEmbedLayerNormalization", embedding, domain="com.microsoft",
             decomposition=f"{_DECOMPOSE}.embedding:quantized_embed_layer_normalization"),
    *entries("RotaryEmbedding MRotaryEmbedding", same_as_first, rotary_links, Trait.ROTARY),
    *entries("MoE QMoE", same_as_first, experts_links),
]  # fmt: skip
