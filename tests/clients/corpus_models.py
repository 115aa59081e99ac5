"""Models of a corpus for clients, by family."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import onnx

PER_FAMILY = 3


def families(corpus: Path) -> Iterator[list[Path]]:
    """Yield a few models of each family, in a seeded random order.

    Models that are or may be rejected, that have fixed sizes, or that support batch 1 only are left out, and so are
    quantized ones, in which rounding decides which token is the most likely.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(corpus.glob("*/*/meta.json")):
        meta = json.loads(file.read_text("utf-8"))
        model = file.with_name("model.onnx")
        if meta.get("expected") == "inject" and model.is_file() and _supports_any_text(model):
            found.setdefault(str(meta["family"]), []).append(file.parent)
    generator = random.Random(5)
    names = sorted(found)
    generator.shuffle(names)
    for name in names:
        yield generator.sample(found[name], min(PER_FAMILY, len(found[name])))


def _supports_any_text(folder_model: Path) -> bool:
    graph = onnx.load(folder_model, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    text = next(value for value in graph.input if value.name not in stored).type.tensor_type
    dims = text.shape.dim
    integers = text.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    quantized = any(node.op_type in _QUANTIZED for node in graph.node)
    free = len(dims) == 2 and not any(dim.HasField("dim_value") for dim in dims)
    exact = all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in graph.output)
    one_text = any(part in folder_model.parent.parent.name for part in ("_b1", "fp16", "bf16"))
    return integers and free and exact and not quantized and not one_text


_QUANTIZED = frozenset((
    "DynamicQuantizeLinear", "QuantizeLinear", "QLinearMatMul", "MatMulInteger", "MatMulNBits", "DequantizeLinear",
))  # fmt: skip
