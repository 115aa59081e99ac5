"""External weights of models in memory, mapped once for all sessions that read them.

onnxruntime copies external weights, and again into the form that its kernels prefer. Two sessions on a large model, as
a verification needs, would take several times its size. Here they read the pages of the file in place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import onnx
import onnxruntime as ort

from kvsurgeon.io.staging import OPEN_FILES
from kvsurgeon.runtime.tensors import to_runtime

_LARGE = 1 << 27  # bytes of weights; smaller models run with the kernels of production
_CAST = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)  # types that kernels for CPUs lack
_SMALLEST = 1 << 16  # bytes of a weight
_DISABLE_PREPACKING = "session.disable_prepacking"
_DISABLE_OPTIMIZERS = "optimization.disable_specified_optimizers"

_mapped: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()  # values of onnxruntime, by their data


def share_weights(model: onnx.ModelProto, folder: Path | None, options: ort.SessionOptions) -> tuple[Any, ...]:
    """Make a session read large external weights in place; return what must live as long as the session.

    Args:
        model: The model.
        folder: The folder of its external weights.
        options: The options of the session.
    """
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    unnamed = {tensor.name: _map(tensor, None) for tensor in external if _location(tensor).startswith(OPEN_FILES)}
    options.add_external_initializers(list(unnamed), list(unnamed.values()))  # onnxruntime reads no other folder
    if folder is None or os.name != "posix":
        return tuple(unnamed.values())
    large = [tensor for tensor in external if tensor.name not in unnamed and _bytes(tensor) >= _SMALLEST]
    if sum(map(_bytes, large)) < _LARGE:
        return tuple(unnamed.values())
    shared = {tensor.name: _map(tensor, folder) for tensor in large}
    for name, value in shared.items():
        options.add_initializer(name, value)
    if all(_is_floating(tensor) for tensor in large):  # operators on quantized weights need the prepared form
        options.add_session_config_entry(_DISABLE_PREPACKING, "1")
    if any(tensor.data_type in _CAST for tensor in large):
        _cast_when_read(options)
    return (*unnamed.values(), *shared.values())


def _cast_when_read(options: ort.SessionOptions) -> None:
    """Make a session convert weights to float32 in each call, just before they are read, and not once for all."""
    options.add_session_config_entry(_DISABLE_OPTIMIZERS, "ConstantFolding")
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL:  # which folds in any case
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED


def _map(tensor: onnx.TensorProto, folder: Path | None) -> Any:
    """Return a weight as a value of onnxruntime, on the pages of its file."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    path = where["location"] if folder is None else str(folder / where["location"])
    dtype, offset = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), int(where.get("offset", 0))
    status = os.stat(path)
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, offset, tensor.data_type, *tensor.dims)
    value = _mapped.get(key)
    if value is None:
        value = to_runtime(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=tuple(tensor.dims)))
        _mapped[key] = value
    return value


def _location(tensor: onnx.TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def _bytes(tensor: onnx.TensorProto) -> int:
    """Return the size of a weight that can be mapped; 0 for packed types."""
    names = onnx.TensorProto.DataType
    if names.Name(tensor.data_type).endswith(("INT4", "INT2", "4E2M1", "STRING")) or not all(tensor.dims):
        return 0
    return int(np.prod(tensor.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _is_floating(tensor: onnx.TensorProto) -> bool:
    return "FLOAT" in onnx.TensorProto.DataType.Name(tensor.data_type) or tensor.data_type == onnx.TensorProto.DOUBLE
