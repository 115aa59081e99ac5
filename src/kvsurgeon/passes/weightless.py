"""A model as a proto without its weights."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InvalidModelError

Placeholder = Callable[[ir.Value], ir.TensorProtocol]


def weightless_proto(model: ir.Model, placeholder: Placeholder) -> onnx.ModelProto:
    """Return the proto of a model with `placeholder(value)` as the tensor of each initializer of the main graph.

    No weight is read, and the model is unchanged.

    Raises:
        InvalidModelError: A node reads a value that nothing defines, or a name or metadata entry is not a string.
    """
    try:
        light = model.clone()
        for value in light.graph.initializers.values():
            value.const_value = placeholder(value)
        return ir.to_proto(light)
    except Exception as error:
        raise InvalidModelError(f"cannot serialize the model: {' '.join(str(error).split())}") from error


def empty_tensor(value: ir.Value) -> ir.TensorProtocol:
    """Return a tensor without elements of the type of an initializer, which `onnx.checker` accepts for any weight."""
    dtype = value.dtype if value.const_value is None else value.const_value.dtype
    proto = onnx.TensorProto(name=value.name, data_type=(dtype or ir.DataType.FLOAT).value, dims=[0])
    return ir.serde.deserialize_tensor(proto)
