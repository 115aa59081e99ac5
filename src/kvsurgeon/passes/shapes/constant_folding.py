"""What follows from numbers is computed once, in onnxruntime: the kernels that would compute it in every call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.graph.editor import Editor

LARGEST = 1 << 26  # bytes of a result that is kept in place of its computation

_KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft")


def name_numbers(model: ir.Model, editor: Editor, shapes: Shapes) -> None:
    """Put constants where whole numbers are computed from shapes alone."""
    outputs = set(model.graph.outputs)
    for node in list(model.graph):
        for value in node.outputs:
            fact = shapes.facts.get(value)
            if fact is None or fact.value is None or fact.dtype is None or value in outputs or not value.uses():
                continue
            if constant_tensor(value) is None and _is_whole(fact.value, fact.dtype):
                _replace(editor, value, fact.value.astype(fact.dtype.numpy()))


def _is_whole(numbers: np.ndarray, dtype: ir.DataType) -> bool:
    whole = not dtype.is_floating_point() and all(isinstance(number, (int, bool)) for number in numbers.reshape(-1))
    return whole and dtype is not ir.DataType.STRING


def compute_constants(model: ir.Model, editor: Editor) -> None:
    """Put constants where something is computed from small constants alone; weights are never read."""
    nodes = _constant_nodes(model.graph)
    inside = set(nodes)
    ends = [value for node in nodes for value in node.outputs if any(user not in inside for user, _ in value.uses())]
    ends = [value for value in ends if not value.is_graph_output()]
    if not ends:
        return
    for value, array in zip(ends, _computed(model, nodes, ends), strict=True):
        if array is not None and array.nbytes <= LARGEST:
            _replace(editor, value, array)


def _constant_nodes(graph: ir.Graph) -> list[ir.Node]:
    found: list[ir.Node] = []
    known: set[ir.Value] = set()
    graph.sort()
    for node in graph:
        if node.domain not in _KNOWN_DOMAINS or node.op_type in ("Constant",) or node.op_type.startswith("Random"):
            continue
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            continue
        if all(value is None or value in known or _is_small(value) for value in node.inputs):
            found.append(node)
            known.update(node.outputs)
    return found


def _is_small(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and not is_weight(tensor) and tensor.dtype is not ir.DataType.STRING


def _computed(model: ir.Model, nodes: Sequence[ir.Node], ends: Sequence[ir.Value]) -> list[np.ndarray | None]:
    """Run the nodes; None for all where onnxruntime lacks a kernel for one."""
    graph = onnx.GraphProto(name="constants")
    leaves = {value for node in nodes for value in node.inputs if value is not None and constant_tensor(value)}
    for value in leaves:
        tensor = constant_tensor(value)
        assert tensor is not None
        proto = ir.to_proto(ir.Tensor(np.asarray(tensor.numpy()), dtype=tensor.dtype, name=value.name))
        graph.initializer.append(proto)
    graph.node.extend(ir.to_proto(node) for node in nodes)
    graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in ends)
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.graph.opset_imports.items()]
    proto_model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(proto_model.SerializeToString(), options, ["CPUExecutionProvider"])
        return [np.asarray(array) for array in session.run(None, {})]
    except Exception:  # a type without kernels, such as bfloat16: the operators stay where they are
        return [None] * len(ends)


def _replace(editor: Editor, value: ir.Value, array: np.ndarray) -> None:
    constant = editor.constant(array, array.dtype, name=f"{value.name}.fixed")
    for node, index in list(value.uses()):
        editor.replace_input(node, index, constant)
