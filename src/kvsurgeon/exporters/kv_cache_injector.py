"""`KeyValueCacheInjector` under the import path of SparseML, whose results ran in DeepSparse."""

import warnings

from kvsurgeon.injector import KeyValueCacheInjector

__all__ = ["KeyValueCacheInjector"]

warnings.warn(
    "DeepSparse runs the result of KeyValueCacheInjector(..., target='deepsparse'); the result without a target is for "
    "other runtimes, and gives other tokens there",
    stacklevel=2,
)
