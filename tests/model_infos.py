"""Synthetic `ModelInfo` objects, for the checks and side files of targets."""

from __future__ import annotations

from typing import Any

from kvsurgeon.targets.model_info import CachePairInfo, ModelInfo, TensorInfo


def model_info(
    config: dict[str, Any] | None = None,
    *,
    kv_heads: int = 2,
    head_dims: dict[str, int] | None = None,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
    dtype: str = "float32",
    data_files: int = 0,
    layers: int = 2,
) -> ModelInfo:
    """Return a model with `head_dims` of keys and values."""
    head_dims = head_dims or {"key": 8, "value": 8}
    cache = []
    for layer in range(layers):
        for kind, head_dim in head_dims.items():
            dims = ("batch_size", kv_heads, "past_sequence_length", head_dim)
            past = TensorInfo(name=f"past_key_values.{layer}.{kind}", dtype=dtype, dims=dims)
            present = TensorInfo(name=f"present.{layer}.{kind}", dtype=dtype, dims=dims)
            cache.append(CachePairInfo(layer=layer, kind=kind, past=past, present=present))
    return ModelInfo(
        inputs=tuple(TensorInfo(name=name, dtype="int64", dims=("batch_size", "sequence_length")) for name in inputs),
        outputs=(TensorInfo(name="logits", dtype="float32", dims=("batch_size", "sequence_length", 99)),),
        cache=tuple(cache),
        opset=18,
        operators={},
        decoder=None,
        config=config or {},
        data_files=data_files,
    )
