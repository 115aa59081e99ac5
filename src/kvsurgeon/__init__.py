"""Inject a KV cache into an exported ONNX decoder, and verify that its results stay the same.

Names are imported on first use, so that `import kvsurgeon` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsurgeon.api import (
        Pipeline,
        Sampling,
        confirm,
        find_attention,
        generate,
        inject,
        inspect,
        load,
        measure_loss,
        plot,
        remove_cache,
        replicate_kv_heads,
        report,
        retarget,
        run,
        save,
        verify,
    )
    from kvsurgeon.errors import (
        BrokenCacheError,
        CertificateError,
        Code,
        InputError,
        InternalError,
        InvalidCertificateError,
        InvalidModelError,
        KvsurgeonError,
        LossError,
        MissingKernelError,
        ParityError,
        PassError,
        PluginError,
        RunError,
        UnsupportedError,
        UsageError,
        WeightsError,
    )
    from kvsurgeon.injector import KeyValueCacheInjector

    __version__: str

__all__ = [
    "BrokenCacheError",
    "CertificateError",
    "Code",
    "InputError",
    "InternalError",
    "InvalidCertificateError",
    "InvalidModelError",
    "KeyValueCacheInjector",
    "KvsurgeonError",
    "LossError",
    "MissingKernelError",
    "ParityError",
    "PassError",
    "Pipeline",
    "PluginError",
    "RunError",
    "Sampling",
    "UnsupportedError",
    "UsageError",
    "WeightsError",
    "__version__",
    "confirm",
    "find_attention",
    "generate",
    "inject",
    "inspect",
    "load",
    "measure_loss",
    "plot",
    "remove_cache",
    "replicate_kv_heads",
    "report",
    "retarget",
    "run",
    "save",
    "verify",
]

_ELSEWHERE = {"KeyValueCacheInjector": "injector", "Code": "errors"}  # than in `api`


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("kvsurgeon")
    if name not in __all__:
        raise AttributeError(f"module 'kvsurgeon' has no attribute {name!r}")
    module = _ELSEWHERE.get(name, "errors" if name.endswith("Error") else "api")
    return getattr(import_module(f"kvsurgeon.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
