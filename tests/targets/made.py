"""Facts of a model that is not there, for what targets write about one."""

from __future__ import annotations

from typing import Any

from kvsurgeon.targets.facts import CacheEntry, Facts, Tensor


def facts(
    config: dict[str, Any] | None = None,
    *,
    kv_heads: int = 2,
    widths: dict[str, int] | None = None,
    inputs: tuple[str, ...] = ("input_ids", "attention_mask"),
    dtype: str = "float32",
    data_files: int = 0,
    layers: int = 2,
) -> Facts:
    """Return facts of a model with so many layers and heads, keys and values being as wide as `widths` says."""
    widths = widths or {"key": 8, "value": 8}
    cache = []
    for layer in range(layers):
        for kind, width in widths.items():
            dims = ("batch_size", kv_heads, "past_sequence_length", width)
            past = Tensor(name=f"past_key_values.{layer}.{kind}", dtype=dtype, dims=dims)
            present = Tensor(name=f"present.{layer}.{kind}", dtype=dtype, dims=dims)
            cache.append(CacheEntry(layer=layer, kind=kind, past=past, present=present))
    return Facts(
        inputs=tuple(Tensor(name=name, dtype="int64", dims=("batch_size", "sequence_length")) for name in inputs),
        outputs=(Tensor(name="logits", dtype="float32", dims=("batch_size", "sequence_length", 99)),),
        cache=tuple(cache),
        opset=18,
        operators={},
        decoder=None,
        config=config or {},
        data_files=data_files,
    )
