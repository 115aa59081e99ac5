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
    graph = model.graph
    # A view of the same nodes: a copy of all would take longer than any stage of the analysis.
    light = ir.GraphView(
        graph.inputs, graph.outputs, nodes=graph, doc_string=graph.doc_string, opset_imports=graph.opset_imports,
        name=graph.name, metadata_props=graph.metadata_props,
        initializers=[_with_tensor(value, placeholder(value)) for value in graph.initializers.values()],
    )  # fmt: skip
    try:
        return ir.to_proto(
            ir.Model(
                light,  # type: ignore[arg-type]  # serialization reads a view like a graph
                ir_version=model.ir_version, producer_name=model.producer_name, domain=model.domain,
                producer_version=model.producer_version, model_version=model.model_version,
                doc_string=model.doc_string, functions=tuple(model.functions.values()),
                metadata_props=model.metadata_props, device_configurations=model.device_configurations,
            )
        )  # fmt: skip
    except Exception as error:
        raise InvalidModelError(f"cannot serialize the model: {' '.join(str(error).split())}") from error


def without_data(value: ir.Value) -> ir.TensorProtocol:
    """Return a tensor of the type and the shape of an initializer, whose data is nowhere."""
    tensor = value.const_value
    shape = ir.Shape([] if tensor is None else tensor.shape.numpy())
    dtype = ir.DataType.FLOAT if tensor is None else tensor.dtype
    return ir.ExternalTensor("weights", None, None, dtype, shape=shape, name=value.name or "")


def empty_tensor(value: ir.Value) -> ir.TensorProtocol:
    """Return a tensor without elements of the type of an initializer, which `onnx.checker` accepts for any weight."""
    dtype = value.dtype if value.const_value is None else value.const_value.dtype
    proto = onnx.TensorProto(name=value.name, data_type=(dtype or ir.DataType.FLOAT).value, dims=[0])
    return ir.serde.deserialize_tensor(proto)


def _with_tensor(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    copy = ir.Value(
        name=value.name, shape=value.shape, type=value.type, doc_string=value.doc_string, const_value=tensor,
        metadata_props=dict(value.metadata_props),
    )  # fmt: skip
    copy.meta.update(value.meta)  # with quantization annotations
    return copy
