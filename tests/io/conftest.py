"""Small models in ONNX text, and folders of models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper

TEXT = """
<ir_version: 9, opset_import: ["" : 17], producer_name: "test", doc_string: "a model">
g (float[n, 4] x) => (float[n, 4] y) {
  h = MatMul (x, w)
  y = Add (h, b)
}
"""


@pytest.fixture
def proto() -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "b"))
    return model


@pytest.fixture
def external(proto: onnx.ModelProto, tmp_path: Path) -> Path:
    """A model file with weight `w` at byte 16 of `model.data`, in a folder with config and tokenizer."""
    folder = tmp_path / "source"
    folder.mkdir()
    weight = proto.graph.initializer[0]
    (folder / "model.data").write_bytes(bytes(16) + weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "model.data", "offset": "16", "length": "64"}.items():
        weight.external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    for name in ("config.json", "tokenizer.json", "merges.txt", "other.onnx", "unrelated.bin", "notes.txt"):
        (folder / name).write_text(name)
    return folder / "model.onnx"
