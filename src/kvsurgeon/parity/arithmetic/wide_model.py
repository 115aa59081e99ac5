"""Models in 16 bits, computed in float32, so that two of them compare without rounding to 16 bits.

Rounding may choose another expert of a mixture, after which everything differs, and onnxruntime has few CPU kernels for
bfloat16. Weights keep their stored values: a `Cast` widens each of them, also external ones, which are not read here.
"""

from __future__ import annotations

import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from kvsurgeon.io.local_functions import nested_nodes

_WIDE = {TensorProto.FLOAT16: TensorProto.FLOAT, TensorProto.BFLOAT16: TensorProto.FLOAT}
_TYPES = ("to", "dtype", "output_dtype")  # attributes that hold an element type


def wide_model(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the model in float32, its inputs and outputs too; None if an input may replace a weight of 16 bits."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    inputs = {value.name for value in wide.graph.input}
    if any(weight.name in inputs and weight.data_type in _WIDE for weight in wide.graph.initializer):
        return None
    inner = [one.g for node in nested_nodes(wide.graph.node) for one in node.attribute if one.HasField("g")]
    for graph in (*reversed(inner), wide.graph):  # a graph gets copies of its nodes, so those inside come first
        _widen_graph(graph)
    for function in wide.functions:
        del function.value_info[:]
        for node in nested_nodes(function.node):
            _widen_attributes(node)
    return wide


def _widen_graph(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output):
        if (kind := value.type.tensor_type.elem_type) in _WIDE:  # a further output may have no type
            value.type.tensor_type.elem_type = _WIDE[kind]
    casts = []
    for weight in graph.initializer:
        if weight.data_type in _WIDE:
            name, weight.name = weight.name, f"{weight.name}/16 bits"
            casts.append(helper.make_node("Cast", [weight.name], [name], to=_WIDE[weight.data_type]))
    for node in graph.node:
        _widen_attributes(node)
    nodes = [*casts, *graph.node]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def _widen_attributes(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type in _WIDE:
            array = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(array, attribute.t.name))
        elif attribute.type == AttributeProto.INT and attribute.name in _TYPES:
            attribute.i = _WIDE.get(attribute.i, attribute.i)
