"""Makes decoders of any size: the graphs of real exporters, with small real weights or with sparse huge ones."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
from onnx import TensorProto, helper

from sizes import dynamo_llama, torchscript_llama
from sizes.node_writer import NodeWriter, fill_with_noise, put_weights_aside

Dialect = Literal["dynamo", "torchscript"]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The sizes of a Llama, and whether each pair of a query and a key has a forget gate (dynamo only)."""

    layers: int
    hidden: int
    ffn: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    forget_gates: bool = False


SHAPES = {
    2: DecoderShape(layers=2, hidden=2048, ffn=8192, query_heads=32, kv_heads=8, head_dim=64, vocab=128256),
    32: DecoderShape(layers=32, hidden=4096, ffn=14336, query_heads=32, kv_heads=8, head_dim=128, vocab=128256),
    80: DecoderShape(layers=80, hidden=8192, ffn=28672, query_heads=64, kv_heads=8, head_dim=128, vocab=128256),
    126: DecoderShape(layers=126, hidden=16384, ffn=53248, query_heads=128, kv_heads=8, head_dim=128, vocab=128256),
}
"""Llama 3.2 1B cut to two layers, and Llama 3.1 8B, 70B and 405B."""


def build(shape: DecoderShape, dialect: Dialect, *, dtype: str = "float32", metadata: bool = True) -> onnx.ModelProto:
    """Return a decoder as one of PyTorch's exporters writes it; its weights have no data."""
    torchscript = dialect == "torchscript"
    opset = 17 if torchscript else 20
    writer = NodeWriter(
        opset=opset, dtype=dtype, constants_are_nodes=torchscript, metadata=metadata and not torchscript
    )
    (torchscript_llama if torchscript else dynamo_llama).write(writer, shape)
    tokens = ["batch_size", "sequence_length"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, tokens) for name in ("input_ids", "attention_mask")
    ]
    return writer.model(inputs, [helper.make_tensor_value_info("logits", writer.element, [*tokens, shape.vocab])])


def with_weights(shape: DecoderShape, dialect: Dialect, *, dtype: str = "float32") -> onnx.ModelProto:
    """Return a decoder that runs: small random weights, the same in both dialects."""
    model = build(shape, dialect, dtype=dtype)
    fill_with_noise(model)
    return model


def write_sparse(folder: Path, shape: DecoderShape, dialect: Dialect, *, dtype: str = "float16") -> Path:
    """Write a decoder whose data file has its true size, and takes no room on disk; return the model's path."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(shape, dialect, dtype=dtype)
    size = put_weights_aside(model, "model.onnx.data")
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with open(folder / "model.onnx.data", "wb") as data:
        os.truncate(data.fileno(), size)
    return folder / "model.onnx"
