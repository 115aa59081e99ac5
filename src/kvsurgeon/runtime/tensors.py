"""Model inputs and outputs: names, types and dims, and conversion between numpy and onnxruntime."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, ValueInfoProto, helper

Array = npt.NDArray[Any]
Dim = str | int | None  # a name, a size, or unknown

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn,
    "tensor(float8e5m2)": ml_dtypes.float8_e5m2,
    "tensor(bool)": np.bool_,
    **{f"tensor({sign}int{bits})": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

# onnxruntime takes types that numpy lacks as integers of the same width, together with their ONNX type.
_STORAGE = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, TensorProto.BFLOAT16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, TensorProto.FLOAT8E4M3FN),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, TensorProto.FLOAT8E5M2),
}


@dataclass(frozen=True, kw_only=True)
class ValueInfo:
    """An input or output as the model declares it.

    Attributes:
        name: Name of the input or output.
        dtype: Element type; None for a sequence, an optional or strings.
        dims: Name or size of each axis.
    """

    name: str
    dtype: np.dtype[Any] | None
    dims: tuple[Dim, ...]

    @property
    def floating(self) -> bool:
        """Whether the elements are floating-point numbers of any width."""
        return self.dtype is not None and (self.dtype.kind == "f" or self.dtype in _STORAGE)

    @property
    def integer(self) -> bool:
        """Whether the elements are integers; booleans are not."""
        return self.dtype is not None and self.dtype.kind in "iu"


def from_proto(info: ValueInfoProto) -> ValueInfo:
    """Return the description of a graph input or output."""
    tensor = info.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    known = tensor.elem_type not in (TensorProto.UNDEFINED, TensorProto.STRING)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type) if known else None
    return ValueInfo(name=info.name, dtype=dtype, dims=dims)


def from_session(info: ort.NodeArg) -> ValueInfo:
    """Return the description of an input or output of an onnxruntime session."""
    dims = tuple(dim if isinstance(dim, str | int) else None for dim in info.shape)
    dtype = _DTYPES.get(info.type)
    return ValueInfo(name=info.name, dtype=None if dtype is None else np.dtype(dtype), dims=dims)


def to_runtime(array: Array) -> ort.OrtValue:
    """Return an array as a value of onnxruntime."""
    array = np.asarray(array, order="C")  # `ascontiguousarray` gives a scalar an axis
    if array.dtype not in _STORAGE:
        return ort.OrtValue.ortvalue_from_numpy(array)
    storage, onnx_type = _STORAGE[array.dtype]
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(storage), onnx_type)


def from_runtime(value: ort.OrtValue) -> Array:
    """Return a copy of a value of onnxruntime as an array of a numpy or ml_dtypes type."""
    dtype = np.dtype(_DTYPES[value.data_type()])
    if dtype not in _STORAGE:
        return np.array(value.numpy())
    size = int(value.tensor_size_in_bytes())
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, dtype=dtype).reshape(value.shape()).copy()
