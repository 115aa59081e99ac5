"""Inject a KV cache into an exported ONNX decoder, and verify that its results stay the same.

Names are imported on first use, so that `import kvsurgeon` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsurgeon.api import (
        Pipeline,
        confirm,
        find_attention,
        generate,
        inject,
        inspect,
        load,
        measure_loss,
        plot,
        replicate_kv_heads,
        report,
        save,
        verify,
    )
    from kvsurgeon.injector import KeyValueCacheInjector

    __version__: str

__all__ = [
    "KeyValueCacheInjector",
    "Pipeline",
    "__version__",
    "confirm",
    "find_attention",
    "generate",
    "inject",
    "inspect",
    "load",
    "measure_loss",
    "plot",
    "replicate_kv_heads",
    "report",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("kvsurgeon")
    if name not in __all__:
        raise AttributeError(f"module 'kvsurgeon' has no attribute {name!r}")
    module = "kvsurgeon.injector" if name == "KeyValueCacheInjector" else "kvsurgeon.api"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
