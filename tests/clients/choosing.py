"""Which models of a corpus a client is shown: of one family after the other, whatever the families are called."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import onnx

TRIED = 3  # models of one family, before another is taken


def families(corpus: Path) -> Iterator[list[Path]]:
    """Yield a few models of one family, in an order of chance that is always the same, and of the next, ...

    Left out are models that are to be refused or may be, those of fixed sizes or that are right for one text only, and
    those whose numbers are rounded, as rounding decides which token is the likeliest.
    """
    found: dict[str, list[Path]] = {}
    for note in sorted(corpus.glob("*/*/meta.json")):
        said = json.loads(note.read_text("utf-8"))
        model = note.with_name("model.onnx")
        if said.get("expected") == "inject" and model.is_file() and _takes_any_text(model):
            found.setdefault(str(said["family"]), []).append(note.parent)
    chance = random.Random(5)
    names = sorted(found)
    chance.shuffle(names)
    for name in names:
        yield chance.sample(found[name], min(TRIED, len(found[name])))


def _takes_any_text(folder_model: Path) -> bool:
    graph = onnx.load(folder_model, load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    text = next(value for value in graph.input if value.name not in stored).type.tensor_type
    dims = text.shape.dim
    whole = text.elem_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    rounded = any(node.op_type in _ROUNDING for node in graph.node)
    free = len(dims) == 2 and not any(dim.HasField("dim_value") for dim in dims)
    exact = all(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for value in graph.output)
    one_text = any(part in folder_model.parent.parent.name for part in ("_b1", "fp16", "bf16"))
    return whole and free and exact and not rounded and not one_text


_ROUNDING = frozenset((
    "DynamicQuantizeLinear", "QuantizeLinear", "QLinearMatMul", "MatMulInteger", "MatMulNBits", "DequantizeLinear",
))  # fmt: skip
