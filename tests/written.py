"""Models as ONNX text: a value without a node and without braces is a weight, filled with random numbers.

A golden file shows nodes, and not the numbers of weights.
"""

from __future__ import annotations

import zlib

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser, printer

LARGEST_SHOWN = 16  # elements of a constant that the text shows


def read(text: str, opset: int = 18) -> onnx.ModelProto:
    """Return the model that a graph's text describes; the same name and shape is the same noise."""
    graph = parser.parse_graph(text)
    made = {output for node in graph.node for output in node.output}
    weights = [value for value in graph.value_info if value.name not in made]
    graph.initializer.extend(_noise(value) for value in weights)
    for value in weights:
        graph.value_info.remove(value)
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(domain, 1) for domain in {node.domain for node in graph.node} - {""}]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def _noise(value: onnx.ValueInfoProto) -> onnx.TensorProto:
    tensor = value.type.tensor_type
    sizes = [size.dim_value for size in tensor.shape.dim]
    random = np.random.default_rng(zlib.crc32(value.name.encode()))
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return numpy_helper.from_array(random.standard_normal(sizes).astype(dtype), value.name)


def write(model: onnx.ModelProto) -> str:
    """Return the text of a model's graph, without the numbers of weights and the types of what nodes make."""
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.value_info[:], graph.initializer[:]
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= LARGEST_SHOWN:
            graph.initializer.append(tensor)
        else:
            graph.value_info.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        del node.metadata_props[:]
    return "\n".join(line.rstrip() for line in printer.to_text(graph).strip().splitlines()) + "\n"
