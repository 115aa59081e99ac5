"""OpenVINO: `Core().read_model(folder/model.onnx)`, as it is or with its caches made into state."""

from __future__ import annotations

from kvsurgeon.targets.target import Target

OPENVINO = Target(
    name="openvino",
    summary="openvino.Core().read_model(folder / 'model.onnx'), also with caches as state",
    tried="openvino 2026.4.1",
    fixed_axes=(1, 3),  # without them a state has no shape
)
