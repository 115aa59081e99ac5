"""OpenVINO: `Core().read_model(folder / "model.onnx")`, stateless or with the cache as state."""

from __future__ import annotations

from collections.abc import Iterator

from kvsurgeon.targets.model_info import ModelInfo
from kvsurgeon.targets.target import Incompatibility, Target, warning

# Measured: `read_model` of one node of each operator of ONNX (opset 27) and of onnxruntime has no conversion rule for
# these, of those that a decoder may hold.
UNSUPPORTED_OPERATORS = frozenset(
    {("", name) for name in ("BitCast", "CausalConvWithState", "CumProd", "LinearAttention", "TensorScatter")}
    | {
        ("com.microsoft", name)
        for name in (
            *("CausalConvWithState", "LinearAttention", "MoE", "QMoE", "QAttention", "MatMulBnb4", "TransposeMatMul"),
            *("DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "PagedAttention", "SparseAttention"),
            *("PackedAttention", "PackedMultiHeadAttention", "RelativePositionBias", "GatedRelativePositionBias"),
        )
    }
)


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
    unsupported_operators=UNSUPPORTED_OPERATORS,
    checks=(_check,),
)
