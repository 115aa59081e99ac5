"""Writes a Llama the way `torch.onnx.export(dynamo=False)` writes one with sdpa attention: about 230 nodes a layer.

Every use of a number is a `Constant` node, and every shape is taken apart and put together again where it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper

from sizes.node_writer import NodeWriter

if TYPE_CHECKING:
    from workloads import DecoderShape

ONE = helper.make_tensor("value", TensorProto.INT64, [1], [1])
TRUE = helper.make_tensor("value", TensorProto.BOOL, [1], [True])


def write(writer: NodeWriter, shape: DecoderShape) -> None:
    """Write the nodes from `input_ids` and `attention_mask` to `logits`."""
    with writer.scope("model"):
        embeddings = writer.weight("model.embed_tokens.weight", shape.vocab, shape.hidden)
        hidden = writer.node("Gather", embeddings, "input_ids", axis=0)
        positions, visible = _context(writer, hidden)
        with writer.scope("rotary_emb"):
            cos, sin = _rotary(writer, shape, positions)
        for layer in range(shape.layers):
            with writer.scope(f"layers.{layer}"):
                hidden = _layer(writer, shape, f"model.layers.{layer}", hidden, cos, sin, visible)
        with writer.scope("norm"):
            _, hidden = _norm(writer, shape, "model.norm.weight", hidden)
    writer.node("MatMul", hidden, writer.weight("lm_head.weight", shape.hidden, shape.vocab), output="logits")


def _context(writer: NodeWriter, hidden: str) -> tuple[str, str]:
    """Return the positions `[1, sequence]`, and which keys are visible `[batch, 1, sequence, sequence]`."""
    node, constant = writer.node, writer.constant
    length = _size(writer, hidden, 1)
    positions = _unsqueezed(writer, _range(writer, length), 0)
    real = node("Cast", "attention_mask", to=TensorProto.BOOL)
    total, batch = _size(writer, real, 1), _size(writer, hidden, 0)
    rows, keys = _range(writer, batch), _range(writer, total)
    for axis in (1, 2, 3):
        rows = _unsqueezed(writer, rows, axis)
    queries = _unsqueezed(writer, _unsqueezed(writer, positions, 1), 3)
    for axis in (0, 1, 2):
        keys = _unsqueezed(writer, keys, axis)
    ones = node("ConstantOfShape", constant(np.zeros(0)), value=TRUE)
    causal = node("And", ones, node("Cast", node("LessOrEqual", keys, queries), to=TensorProto.BOOL))
    stride = node("Gather", node("Shape", real), constant([1]), axis=0)
    flat = node("Flatten", real, axis=2)
    indices = node("Add", keys, node("Mul", rows, stride))
    kept = node("Gather", flat, indices, axis=0)
    sizes = node("Shape", indices)
    kept = node(
        "Reshape", node("Reshape", kept, constant([-1]), allowzero=0), node("Concat", sizes, axis=0), allowzero=0
    )
    visible = node("And", causal, node("Cast", kept, to=TensorProto.BOOL))
    batch = _unsqueezed(writer, batch, 0)
    parts = [batch, constant([-1]), *(_unsqueezed(writer, size, 0) for size in (length, total))]
    return positions, _expanded(writer, visible, parts)


def _rotary(writer: NodeWriter, shape: DecoderShape, positions: str) -> tuple[str, str]:
    node, constant = writer.node, writer.constant
    frequencies = 10000.0 ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    column = node("Cast", _unsqueezed(writer, positions, 2), to=TensorProto.FLOAT)
    angles = node("Mul", column, constant(frequencies, "float32"))
    angles = node("Concat", angles, angles, axis=-1)
    tables = [node("Mul", node(operator, angles), constant(1.0, "float32")) for operator in ("Cos", "Sin")]
    cos, sin = (_unsqueezed(writer, node("Cast", table, to=writer.element), 1) for table in tables)
    return cos, sin


def _layer(writer: NodeWriter, shape: DecoderShape, name: str, hidden: str, cos: str, sin: str, visible: str) -> str:
    with writer.scope("input_layernorm"):
        residual, normed = _norm(writer, shape, f"{name}.input_layernorm.weight", hidden)
    with writer.scope("self_attn"):
        attended = _attention(writer, shape, f"{name}.self_attn", normed, cos, sin, visible)
    hidden = writer.node("Add", residual, attended)
    with writer.scope("post_attention_layernorm"):
        residual, normed = _norm(writer, shape, f"{name}.post_attention_layernorm.weight", hidden)
    with writer.scope("mlp"):
        fed = _feed_forward(writer, shape, f"{name}.mlp", normed)
    return writer.node("Add", residual, fed)


def _norm(writer: NodeWriter, shape: DecoderShape, gain: str, hidden: str) -> tuple[str, str]:
    """Return what the next residual adds to, and the normed; the residual shares a cast that changes nothing."""
    node, constant = writer.node, writer.constant
    wide = node("Cast", hidden, to=TensorProto.FLOAT)
    square = node("Pow", wide, constant(2.0, "float32"))
    mean = node("ReduceMean", square, axes=[-1], keepdims=1)
    root = node("Sqrt", node("Add", mean, constant(1e-6, "float32")))
    scaled = node("Cast", node("Mul", wide, node("Div", constant(1.0, "float32"), root)), to=writer.element)
    normed = node("Mul", writer.weight(gain, shape.hidden), scaled)
    return (wide if writer.dtype == "float32" else hidden), normed


def _attention(
    writer: NodeWriter, shape: DecoderShape, name: str, hidden: str, cos: str, sin: str, visible: str
) -> str:
    node, constant, inner = writer.node, writer.constant, shape.query_heads * shape.head_dim
    batch, length = _size(writer, hidden, 0), _size(writer, hidden, 1)
    heads = {}
    for letter, count in (("q", shape.query_heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
        weight = writer.weight(f"{name}.{letter}_proj.weight", shape.hidden, count * shape.head_dim)
        parts = [_unsqueezed(writer, size, 0) for size in (batch, length)]
        target = node("Concat", *parts, constant([-1]), constant([shape.head_dim]), axis=0)
        split = node("Reshape", node("MatMul", hidden, weight), target, allowzero=0)
        heads[letter] = node("Transpose", split, perm=[0, 2, 1, 3])
    query, key = _rotate(writer, heads["q"], cos, sin), _rotate(writer, heads["k"], cos, sin)
    new = _size(writer, query, 2)
    key, value = _repeat(writer, shape, key), _repeat(writer, shape, heads["v"])
    context = _attend(writer, shape, query, key, value, visible)
    parts = [_unsqueezed(writer, _size(writer, context, 0), 0), constant([-1]), _unsqueezed(writer, new, 0)]
    width = _unsqueezed(writer, _size(writer, value, 3), 0)
    context = node("Reshape", context, node("Concat", *parts, width, axis=0), allowzero=0)
    context = node("Transpose", context, perm=[0, 2, 1, 3])
    flat = node("Concat", *(_unsqueezed(writer, size, 0) for size in (batch, length)), constant([-1]), axis=0)
    context = node("Reshape", context, flat, allowzero=0)
    return node("MatMul", context, writer.weight(f"{name}.o_proj.weight", inner, shape.hidden))


def _rotate(writer: NodeWriter, heads: str, cos: str, sin: str) -> str:
    node, constant = writer.node, writer.constant
    straight = node("Mul", heads, cos)
    half = node("Div", _size(writer, heads, 3), constant(2))
    half = node("Cast", node("Cast", half, to=TensorProto.INT64), to=TensorProto.INT64)
    axis, start = constant([3]), constant([0])
    left = node("Slice", heads, start, _unsqueezed(writer, half, 0), axis, constant([1]))
    axis, start = constant([3]), _unsqueezed(writer, half, 0)
    right = node("Slice", heads, start, constant([2**63 - 1]), axis, constant([1]))
    rotated = node("Concat", node("Neg", right), left, axis=-1)
    return node("Add", straight, node("Mul", rotated, sin))


def _repeat(writer: NodeWriter, shape: DecoderShape, heads: str) -> str:
    node, constant, repeats = writer.node, writer.constant, shape.query_heads // shape.kv_heads
    batch, count, length, width = (_size(writer, heads, axis) for axis in range(4))
    single = _unsqueezed(writer, heads, 2)
    parts = [_unsqueezed(writer, size, 0) for size in (batch, count)]
    parts.append(constant([repeats]))
    parts.extend(_unsqueezed(writer, size, 0) for size in (length, width))
    expanded = _expanded(writer, single, parts)
    merged = node("Mul", count, constant(repeats))
    target = node("Concat", *(_unsqueezed(writer, size, 0) for size in (batch, merged, length, width)), axis=0)
    return node("Reshape", expanded, target, allowzero=0)


def _attend(writer: NodeWriter, shape: DecoderShape, query: str, key: str, value: str, visible: str) -> str:
    node, constant, dtype = writer.node, writer.constant, writer.dtype
    transposed = node("Transpose", key, perm=[0, 1, 3, 2])
    query = node("Mul", query, constant(shape.head_dim**-0.25, dtype))
    scores = node("MatMul", query, node("Mul", transposed, constant(shape.head_dim**-0.25, dtype)))
    mask = node("Where", visible, constant([0.0], dtype), constant([-np.inf], dtype))
    weights = node("Softmax", node("Add", scores, mask), axis=-1)
    weights = node("Where", node("IsNaN", weights), constant([0.0], dtype), weights)
    return node("MatMul", weights, value)


def _feed_forward(writer: NodeWriter, shape: DecoderShape, name: str, hidden: str) -> str:
    gate = writer.node("MatMul", hidden, writer.weight(f"{name}.gate_proj.weight", shape.hidden, shape.ffn))
    gate = writer.node("Mul", gate, writer.node("Sigmoid", gate))
    up = writer.node("MatMul", hidden, writer.weight(f"{name}.up_proj.weight", shape.hidden, shape.ffn))
    down = writer.weight(f"{name}.down_proj.weight", shape.ffn, shape.hidden)
    return writer.node("MatMul", writer.node("Mul", gate, up), down)


def _size(writer: NodeWriter, value: str, axis: int) -> str:
    """Return one dim as a scalar, by the chain of `x.shape[axis]`."""
    return writer.node("Gather", writer.node("Shape", value), writer.constant(axis), axis=0)


def _unsqueezed(writer: NodeWriter, value: str, axis: int) -> str:
    return writer.node("Unsqueeze", value, writer.constant([axis]))


def _range(writer: NodeWriter, size: str) -> str:
    limit = writer.node("Cast", size, to=TensorProto.INT64)
    return writer.node("Range", writer.constant(0), limit, writer.constant(1))


def _expanded(writer: NodeWriter, value: str, parts: list[str]) -> str:
    """Return `value.expand(parts)`: ones replace each -1."""
    node, constant = writer.node, writer.constant
    target = node("Reshape", node("Concat", *parts, axis=0), constant([-1]), allowzero=0)
    ones = node("ConstantOfShape", node("Shape", target), value=ONE)
    kept = node("Equal", target, node("Mul", ones, constant(-1)))
    return node("Expand", value, node("Where", kept, ones, target))
