"""The face that users of SparseML know: `KeyValueCacheInjector(model_path).apply(model)`."""

from __future__ import annotations

from pathlib import Path

import onnx

from kvsurgeon import io
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.inject import Inject


class KeyValueCacheInjector:
    """Give a decoder a KV cache, by what its graph computes."""

    supported_models = "any causal decoder, of any exporter: nothing is decided by a model's type"

    def __init__(self, model_path: str | Path | None = None, inplace: bool = True) -> None:
        self.folder = None if model_path is None else Path(model_path)
        self.inplace = inplace

    def apply(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return the model with a cache."""
        loaded = io.load(model)
        Inject().apply(Subject(model=loaded))
        result = io.to_proto(loaded)
        if self.inplace:
            model.CopyFrom(result)
            return model
        return result
