"""OpenVINO: `Core().read_model(folder / "model.onnx")`, stateless or with the cache as state."""

from __future__ import annotations

from kvsurgeon.targets.target import Target

OPENVINO = Target(
    name="openvino",
    summary="openvino.Core().read_model(folder / 'model.onnx'), also with caches as state",
    tested_with="openvino 2026.4.1",
    required=("logits",),  # any text input will do: token ids, or embeddings
    states={"conv_state", "recurrent_state"},
    static_axes=(1, 3),  # otherwise a state has no shape
)
