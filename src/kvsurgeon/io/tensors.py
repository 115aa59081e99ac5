"""Check that the data of a tensor has the size that its dims and type require, without reading an element."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InvalidModelError, WeightsError

Describe = Callable[[], str]  # returns how a message names the tensor; called only for a message
_LARGEST = 2**63 - 1  # elements, which an ONNX dim, an int64, can count
_TYPES = {int(dtype): dtype for dtype in ir.DataType if dtype != ir.DataType.UNDEFINED}
_COMPLEX = frozenset({ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})
_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT64: "uint64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.STRING: "string_data",
}  # all other types use int32_data


def size_in_bytes(elements: int, dtype: ir.DataType) -> int:
    """Return the size of so many elements; types of fewer than 8 bits are packed."""
    return (elements * int(dtype.bitwidth) + 7) // 8


def check_tensor(tensor: onnx.TensorProto, describe: Describe) -> bool:
    """Check the size of a tensor's data, and return whether the data is external.

    Of external data only the reference is checked; `check_weights` checks the file.

    Raises:
        InvalidModelError: Dims, type and data do not fit together.
        WeightsError: The reference to external data is invalid.
    """
    dtype = _TYPES.get(tensor.data_type)
    if dtype is None:
        raise InvalidModelError(f"expected an element type of ONNX, found number {tensor.data_type} - at {describe()}")
    elements: int = math.prod(tensor.dims)
    if tensor.dims and (min(tensor.dims) < 0 or elements > _LARGEST):
        raise InvalidModelError(f"expected dims of a tensor, found {list(tensor.dims)} - at {describe()}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_reference(tensor, dtype, describe)
        return True
    if dtype != ir.DataType.STRING and tensor.HasField("raw_data"):
        expected, found, unit = size_in_bytes(elements, dtype), len(tensor.raw_data), "bytes"
    else:
        field = _FIELDS.get(dtype, "int32_data")
        expected, found, unit = _entries(elements, dtype), len(getattr(tensor, field)), f"entries in {field}"
    if expected != found:
        raise InvalidModelError(
            f"expected {expected} {unit} for {dtype.name}{list(tensor.dims)}, found {found} - at {describe()}; "
            "the file is damaged, export it again"
        )
    return False


def _entries(elements: int, dtype: ir.DataType) -> int:
    """Return the number of entries in the typed field of a tensor; elements of 2 and 4 bits share one."""
    if dtype == ir.DataType.STRING:
        return elements
    if dtype in _COMPLEX:
        return 2 * elements
    return size_in_bytes(elements, dtype) if int(dtype.bitwidth) in (2, 4) else elements


def _check_reference(tensor: onnx.TensorProto, dtype: ir.DataType, describe: Describe) -> None:
    if dtype == ir.DataType.STRING:
        raise InvalidModelError(f"strings cannot be external data - at {describe()}")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not entries.get("location"):
        raise WeightsError(f"external data has no location - at {describe()}")
    for key in ("offset", "length"):
        if key in entries and not (entries[key].isascii() and entries[key].isdigit()):
            raise WeightsError(
                f"expected a number of bytes as {key} of external data, found {entries[key]!r} - at {describe()}"
            )
