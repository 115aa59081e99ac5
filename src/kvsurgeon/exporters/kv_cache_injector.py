"""`KeyValueCacheInjector` under the import path of SparseML, whose results ran in DeepSparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvsurgeon import injector

__all__ = ["KeyValueCacheInjector"]


class DeepSparseInjector(injector.KeyValueCacheInjector):
    """Inject a KV cache in the form that DeepSparse runs, as SparseML did.

    The inputs are `input_ids` and `attention_mask`, `positions` if they do not follow from the mask, `causal_mask` and
    the cache.

    Args:
        model_path: The folder or file of the model.
        inplace: Whether `apply` changes the proto that it is given, and returns it.
        target: Name of the runtime that loads the result; None for one that needs no other form, such as onnxruntime.
        **options: As of `kvsurgeon.KeyValueCacheInjector`.

    Raises:
        UsageError: An override is unknown, or excludes another.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        inplace: bool = True,
        *,
        target: str | None = "deepsparse",
        **options: Any,
    ) -> None:
        super().__init__(model_path, inplace, target=target, **options)


KeyValueCacheInjector = DeepSparseInjector
