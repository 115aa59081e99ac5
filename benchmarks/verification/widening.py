"""Makes a bfloat16 model run where there are no bfloat16 kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

WIDER: dict[int, int] = {TensorProto.BFLOAT16: TensorProto.FLOAT}


def widened(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """Return a model that computes in float32 what `model` computes in bfloat16, from the same weights."""
    wide: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.load_external_data_for_model(wide, str(folder))
    for value in (*wide.graph.input, *wide.graph.output):
        tensor = value.type.tensor_type
        tensor.elem_type = WIDER.get(tensor.elem_type, tensor.elem_type)
    for graph in _graphs(wide.graph):
        del graph.value_info[:]
        for weight in graph.initializer:
            _widen(weight)
    for attribute in _attributes(wide):
        if attribute.type == AttributeProto.TENSOR:
            _widen(attribute.t)
        elif attribute.name in ("to", "dtype"):
            attribute.i = WIDER.get(attribute.i, attribute.i)
    return wide


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in WIDER:
        array = numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph, and those of its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _attributes(model: onnx.ModelProto) -> Iterator[AttributeProto]:
    nodes = [node for graph in _graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    for node in nodes:
        yield from node.attribute
