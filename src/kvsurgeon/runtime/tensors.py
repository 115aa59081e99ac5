"""Tensors at a model's border: their types in numpy's words, and their way into and out of onnxruntime."""

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
Dim = str | int | None  # a symbol, a size, or nothing known

_DTYPES: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(float8e4m3fn)": ml_dtypes.float8_e4m3fn,
    "tensor(float8e5m2)": ml_dtypes.float8_e5m2,
    "tensor(bool)": np.bool_,
    **{f"tensor({name})": np.dtype(name) for name in ("int8", "int16", "int32", "int64")},
    **{f"tensor({name})": np.dtype(name) for name in ("uint8", "uint16", "uint32", "uint64")},
}

# Types that numpy has no name for travel as integers of their width, under their ONNX type.
_CARRIED = {
    np.dtype(ml_dtypes.bfloat16): (np.uint16, TensorProto.BFLOAT16),
    np.dtype(ml_dtypes.float8_e4m3fn): (np.uint8, TensorProto.FLOAT8E4M3FN),
    np.dtype(ml_dtypes.float8_e5m2): (np.uint8, TensorProto.FLOAT8E5M2),
}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One input or output of a model, as the model declares it."""

    name: str
    dtype: np.dtype[Any] | None  # None: a sequence, an optional, a string
    dims: tuple[Dim, ...]

    @property
    def floating(self) -> bool:
        """Whether it holds real numbers, in any width."""
        return self.dtype is not None and (self.dtype.kind == "f" or self.dtype in _CARRIED)

    @property
    def integer(self) -> bool:
        """Whether it holds integers (a boolean is none)."""
        return self.dtype is not None and self.dtype.kind in "iu"


def from_proto(info: ValueInfoProto) -> Tensor:
    """Return what a graph says of one input or output."""
    given = info.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in given.shape.dim)
    known = given.elem_type not in (TensorProto.UNDEFINED, TensorProto.STRING)
    return Tensor(name=info.name, dtype=helper.tensor_dtype_to_np_dtype(given.elem_type) if known else None, dims=dims)


def declared(info: Any) -> Tensor:
    """Return what onnxruntime knows of one input or output."""
    dims = tuple(dim if isinstance(dim, str | int) else None for dim in info.shape)
    found = _DTYPES.get(info.type)
    return Tensor(name=info.name, dtype=None if found is None else np.dtype(found), dims=dims)


def to_runtime(array: Array) -> Any:
    """Return the array as onnxruntime holds it."""
    array = np.ascontiguousarray(array)
    if array.dtype not in _CARRIED:
        return ort.OrtValue.ortvalue_from_numpy(array)
    carrier, onnx_type = _CARRIED[array.dtype]
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(carrier), onnx_type)


def from_runtime(value: Any) -> Array:
    """Return an array of its own, in numpy's types or those of ml_dtypes."""
    dtype = np.dtype(_DTYPES[value.data_type()])
    if dtype not in _CARRIED:
        return np.array(value.numpy())
    size = int(value.tensor_size_in_bytes())
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    return np.frombuffer(raw, dtype=dtype).reshape(value.shape()).copy()
