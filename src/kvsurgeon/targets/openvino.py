"""OpenVINO: `Core().read_model(folder / "model.onnx")`, stateless or with the cache as state."""

from __future__ import annotations

from collections.abc import Iterator

from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target, warning


def _check(_: ModelInfo) -> Iterator[Incompatibility]:
    yield warning(
        "OpenVINO's defaults may compute in 16 bits and store the cache in 8, which moves logits by up to 0.1",
        hint="compile_model with INFERENCE_PRECISION_HINT and KV_CACHE_PRECISION f32 computes what was verified",
    )


OPENVINO = Target(
    name="openvino",
    summary="openvino.Core().read_model(folder / 'model.onnx'), also with caches as state",
    tested_with="openvino 2026.4.1",
    required=("logits",),  # any text input will do: token ids, or embeddings
    states={"conv_state", "recurrent_state"},
    static_axes=(1, 3),  # otherwise a state has no shape
    checks=(_check,),
)
