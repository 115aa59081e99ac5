"""`KeyValueCacheInjector` under the import path of SparseML, whose results ran in DeepSparse."""

import warnings

from kvsurgeon.injector import KeyValueCacheInjector

__all__ = ["KeyValueCacheInjector"]

warnings.warn(
    "DeepSparse runs the result of KeyValueCacheInjector(..., target='deepsparse'), with internal_kv_cache=False; "
    "the result without a target is for other runtimes",
    stacklevel=2,
)
