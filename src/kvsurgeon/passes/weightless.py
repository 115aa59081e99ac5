"""A model as a proto without its weights: something small stands where each initializer's values were."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir

from kvsurgeon.errors import InvalidModelError

StandIn = Callable[[ir.Value], ir.TensorProtocol]


def weightless(model: ir.Model, stand_in: StandIn) -> onnx.ModelProto:
    """Return the proto of `model` with `stand_in(initializer)` for each tensor of the main graph.

    No weight is read, and the model is left alone.
    """
    graph = model.graph
    view = ir.GraphView(
        graph.inputs,
        graph.outputs,
        nodes=graph,
        initializers=[_twin(value, stand_in(value)) for value in graph.initializers.values()],
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=graph.metadata_props,
    )
    lightened = ir.Model(
        view,  # type: ignore[arg-type]  # serialisation reads a view as it reads a graph
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
        return ir.to_proto(lightened)
    except Exception as error:  # names and notes that are no text
        raise InvalidModelError(f"the model cannot be written: {' '.join(str(error).split())}") from error


def empty(value: ir.Value) -> ir.TensorProtocol:
    """Return a tensor without elements, of the initializer's type: what `onnx.checker` accepts for any weight."""
    dtype = value.dtype if value.const_value is None else value.const_value.dtype
    proto = onnx.TensorProto(name=value.name, data_type=(dtype or ir.DataType.FLOAT).value, dims=[0])
    return ir.serde.deserialize_tensor(proto)


def _twin(value: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
    twin = ir.Value(
        name=value.name,
        shape=value.shape,
        type=value.type,
        doc_string=value.doc_string,
        const_value=tensor,
        metadata_props=dict(value.metadata_props),
    )
    twin.meta.update(value.meta)  # quantisation annotations live here
    return twin
