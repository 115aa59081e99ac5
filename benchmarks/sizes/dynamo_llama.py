"""Writes a Llama the way `torch.onnx.export(dynamo=True)` writes one with sdpa attention: about 73 nodes a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
from onnx import TensorProto

from sizes.node_writer import NUMPY, NodeWriter

if TYPE_CHECKING:
    from workloads import DecoderShape

B, S = "batch_size", "sequence_length"
LAST, FIRST = 2**63 - 1, -(2**63)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Names of the values that the exporter computes once for all layers."""

    cos: str  # [1, 1, sequence, head_dim]
    sin: str
    visible: str  # [batch, 1, sequence, sequence], bool
    mask: str  # the same, additive
    split: str  # shapes
    repeat: str
    merge: str
    flat: str


def write(writer: NodeWriter, shape: DecoderShape) -> None:
    """Write the nodes from `input_ids` and `attention_mask` to `logits`."""
    embeddings = writer.weight("model.embed_tokens.weight", shape.vocab, shape.hidden)
    with writer.scope("model"):
        hidden = writer.node("Gather", embeddings, "input_ids", axis=0, dims=(B, S, shape.hidden))
        shared = _shared(writer, shape)
    for layer in range(shape.layers):
        with writer.scope(f"model.layers.{layer}"):
            hidden = _layer(writer, shape, shared, f"model.layers.{layer}", hidden)
    hidden = _norm(writer, shape, "model.norm.weight", hidden)
    writer.node("MatMul", hidden, writer.weight("lm_head.weight", shape.hidden, shape.vocab), output="logits")


def _shared(writer: NodeWriter, shape: DecoderShape) -> Shared:
    node, constant = writer.node, writer.constant
    batch_1d = node("Shape", "attention_mask", start=0, end=1)
    batch = node("Squeeze", batch_1d)
    length_1d = node("Shape", "attention_mask", start=1, end=2)
    length = node("Squeeze", length_1d)
    positions = node("Range", constant(0), length, constant(1))
    real = node("Cast", "attention_mask", to=TensorProto.BOOL)
    visible = _visible(writer, real, node("Range", constant(0), batch, constant(1)), positions)
    frequencies = 10000.0 ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = node("Cast", node("Unsqueeze", positions, constant([0, 2])), to=TensorProto.FLOAT)
    angles = node("Mul", angles, constant(frequencies, "float32"))
    angles = node("Concat", angles, angles, axis=-1)
    cos, sin = _narrow(writer, node("Cos", angles)), _narrow(writer, node("Sin", angles))
    lowest = float(ml_dtypes.finfo(NUMPY[writer.dtype]).min)
    minus_one, width = constant([-1]), constant([shape.head_dim])
    repeats = constant([shape.query_heads // shape.kv_heads])
    return Shared(
        split=node("Concat", batch_1d, length_1d, minus_one, width, axis=0),
        cos=node("Unsqueeze", cos, constant([1])),
        sin=node("Unsqueeze", sin, constant([1])),
        repeat=node("Concat", batch_1d, constant([shape.kv_heads]), repeats, length_1d, width, axis=0),
        visible=visible,
        merge=node("Concat", batch_1d, constant([shape.query_heads]), length_1d, width, axis=0),
        mask=node("Where", visible, constant(0.0, writer.dtype), constant(lowest, writer.dtype), dims=(B, 1, S, S)),
        flat=node("Concat", batch_1d, length_1d, minus_one, axis=0),
    )


def _visible(writer: NodeWriter, real: str, rows: str, positions: str) -> str:
    """Return `[batch, 1, sequence, sequence]`: causal, and not padding."""
    node, constant = writer.node, writer.constant
    rows = node("Unsqueeze", node("Unsqueeze", rows, constant([1, 2])), constant([3]))
    positions = node("Unsqueeze", positions, constant([0, 1]))
    queries, keys = node("Unsqueeze", positions, constant([3])), node("Unsqueeze", positions, constant([2]))
    causal = node("And", constant(True, "bool"), node("LessOrEqual", keys, queries))
    grid = node("Shape", node("Max", rows, keys), start=0)
    indices = [node("Unsqueeze", node("Expand", part, grid), constant([-1])) for part in (rows, keys)]
    kept = node("GatherND", real, node("Concat", *indices, axis=-1), batch_dims=0)
    return node("And", causal, kept)


def _layer(writer: NodeWriter, shape: DecoderShape, shared: Shared, name: str, hidden: str) -> str:
    wide = (B, S, shape.hidden)
    with writer.scope("input_layernorm"):
        normed = _norm(writer, shape, f"{name}.input_layernorm.weight", hidden)
    with writer.scope("self_attn.sdpa"):
        attended = _attention(writer, shape, shared, f"{name}.self_attn", normed)
    hidden = writer.node("Add", hidden, attended, dims=wide)
    with writer.scope("post_attention_layernorm"):
        normed = _norm(writer, shape, f"{name}.post_attention_layernorm.weight", hidden)
    with writer.scope("mlp.act_fn"):
        fed = _feed_forward(writer, shape, f"{name}.mlp", normed)
    return writer.node("Add", hidden, fed, dims=wide)


def _attention(writer: NodeWriter, shape: DecoderShape, shared: Shared, name: str, hidden: str) -> str:
    query = _heads(writer, shape, shared, f"{name}.q_proj.weight", hidden, shape.query_heads)
    key = _heads(writer, shape, shared, f"{name}.k_proj.weight", hidden, shape.kv_heads)
    value = _heads(writer, shape, shared, f"{name}.v_proj.weight", hidden, shape.kv_heads)
    query, key = (_rotate(writer, shape, shared, heads) for heads in (query, key))
    key, value = (_repeat(writer, shape, shared, heads) for heads in (key, value))
    decay = _decay(writer, shape, shared, name, hidden) if shape.forget_gates else None
    context = _attend(writer, shape, query, key, value, [shared.mask, *([decay] if decay else [])])
    context = writer.node("Transpose", context, perm=[0, 2, 1, 3], dims=(B, S, shape.query_heads, shape.head_dim))
    inner = shape.query_heads * shape.head_dim
    context = writer.node("Reshape", context, shared.flat, allowzero=1, dims=(B, S, inner))
    output = writer.weight(f"{name}.o_proj.weight", inner, shape.hidden)
    return writer.node("MatMul", context, output, dims=(B, S, shape.hidden))


def _norm(writer: NodeWriter, shape: DecoderShape, gain: str, hidden: str) -> str:
    node, constant, wide = writer.node, writer.constant, (B, S, shape.hidden)
    hidden = hidden if writer.dtype == "float32" else writer.node("Cast", hidden, to=TensorProto.FLOAT)
    square = node("Pow", hidden, constant(2.0, "float32"))
    mean = node("ReduceMean", square, constant([-1]), keepdims=1, noop_with_empty_axes=0)
    root = node("Sqrt", node("Add", mean, constant(1e-6, "float32")))
    scaled = _narrow(writer, node("Mul", hidden, node("Reciprocal", root)))
    return node("Mul", writer.weight(gain, shape.hidden), scaled, dims=wide)


def _heads(writer: NodeWriter, shape: DecoderShape, shared: Shared, weight: str, hidden: str, heads: int) -> str:
    width = heads * shape.head_dim
    linear = writer.node("MatMul", hidden, writer.weight(weight, shape.hidden, width), dims=(B, S, width))
    split = writer.node("Reshape", linear, shared.split, allowzero=1, dims=(B, S, heads, shape.head_dim))
    return writer.node("Transpose", split, perm=[0, 2, 1, 3], dims=(B, heads, S, shape.head_dim))


def _rotate(writer: NodeWriter, shape: DecoderShape, shared: Shared, heads: str) -> str:
    node, constant, half = writer.node, writer.constant, shape.head_dim // 2
    straight = node("Mul", heads, shared.cos)
    left = node("Slice", heads, constant([0]), constant([half]), constant([3]), constant([1]))
    right = node("Slice", heads, constant([half]), constant([LAST]), constant([3]), constant([1]))
    rotated = node("Concat", node("Neg", right), left, axis=-1)
    return node("Add", straight, node("Mul", rotated, shared.sin))


def _repeat(writer: NodeWriter, shape: DecoderShape, shared: Shared, heads: str) -> str:
    single = writer.node("Unsqueeze", heads, writer.constant([2]), dims=(B, shape.kv_heads, 1, S, shape.head_dim))
    expanded = writer.node("Expand", single, shared.repeat)
    dims = (B, shape.query_heads, S, shape.head_dim)
    return writer.node("Reshape", expanded, shared.merge, allowzero=1, dims=dims)


def _decay(writer: NodeWriter, shape: DecoderShape, shared: Shared, name: str, hidden: str) -> str:
    """Return the sum of the logarithms of a query's forget gates from each key on: `[batch, heads, queries, keys]`."""
    node, constant = writer.node, writer.constant
    query = _heads(writer, shape, shared, f"{name}.gate_q_proj.weight", hidden, shape.query_heads)
    key = _heads(writer, shape, shared, f"{name}.gate_k_proj.weight", hidden, shape.query_heads)
    gates = node("Log", node("Sigmoid", node("MatMul", query, node("Transpose", key, perm=[0, 1, 3, 2]))))
    gates = node("Where", shared.visible, gates, constant(0.0, writer.dtype))
    return node("CumSum", gates, constant(-1), exclusive=1, reverse=1)


def _attend(writer: NodeWriter, shape: DecoderShape, query: str, key: str, value: str, biases: Sequence[str]) -> str:
    node, constant = writer.node, writer.constant
    scale = constant(shape.head_dim**-0.25, writer.dtype)
    sizes = node("Shape", key, start=0)
    last = node("Slice", sizes, constant([-1]), constant([LAST]))
    second = node("Slice", sizes, constant([-2]), constant([-1]))
    leading = node("Slice", sizes, constant([FIRST]), constant([-2]))
    flat = node("Reshape", key, node("Concat", constant([-1]), second, last, axis=0), allowzero=0)
    transposed = node("Transpose", flat, perm=[0, 2, 1])
    transposed = node("Reshape", transposed, node("Concat", leading, last, second, axis=0), allowzero=0)
    scores = node("MatMul", node("Mul", query, scale), node("Mul", transposed, scale))
    for bias in biases:
        scores = node("Add", scores, bias)
    weights = node("Softmax", scores, axis=-1)
    weights = node("Where", node("IsNaN", weights), constant(0.0, writer.dtype), weights)
    return node("MatMul", weights, value, dims=(B, shape.query_heads, S, shape.head_dim))


def _feed_forward(writer: NodeWriter, shape: DecoderShape, name: str, hidden: str) -> str:
    node, inner = writer.node, (B, S, shape.ffn)
    gate = node("MatMul", hidden, writer.weight(f"{name}.gate_proj.weight", shape.hidden, shape.ffn), dims=inner)
    gate = node("Mul", gate, node("Sigmoid", gate, dims=inner), dims=inner)
    up = node("MatMul", hidden, writer.weight(f"{name}.up_proj.weight", shape.hidden, shape.ffn), dims=inner)
    down = writer.weight(f"{name}.down_proj.weight", shape.ffn, shape.hidden)
    return node("MatMul", node("Mul", gate, up, dims=inner), down, dims=(B, S, shape.hidden))


def _narrow(writer: NodeWriter, value: str) -> str:
    return value if writer.dtype == "float32" else writer.node("Cast", value, to=writer.element)
