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
        InvalidModelError: A name or a metadata entry is not a string.
    """
    graph = model.graph
    view = ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=graph,
        initializers=[_copy(value, placeholder(value)) for value in graph.initializers.values()],
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    light = ir.Model(
        view,  # type: ignore[arg-type]  # a view is serialized like a graph
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=tuple(model.functions.values()),
        metadata_props=model.metadata_props,
        device_configurations=model.device_configurations,
    )
    try:
        return ir.to_proto(light)
    except Exception as error:
        raise InvalidModelError(f"cannot serialize the model: {' '.join(str(error).split())}") from error


def empty_tensor(value: ir.Value) -> ir.TensorProtocol:
    """Return a tensor without elements of the type of an initializer, which `onnx.checker` accepts for any weight."""
    dtype = value.dtype if value.const_value is None else value.const_value.dtype
    proto = onnx.TensorProto(name=value.name, data_type=(dtype or ir.DataType.FLOAT).value, dims=[0])
    return ir.serde.deserialize_tensor(proto)


def _copy(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    copy = ir.Value(
        name=value.name,
        shape=value.shape,
        type=value.type,
        doc_string=value.doc_string,
        const_value=tensor,
        metadata_props=dict(value.metadata_props),
    )
    copy.meta.update(value.meta)  # with the quantization annotations
    return copy
