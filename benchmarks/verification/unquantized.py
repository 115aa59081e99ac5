"""Models whose activations are not quantized: what is left of a difference is not the rounding's."""

from __future__ import annotations

import onnx
from onnx import helper

from verification.independent_verifier import DYNAMIC_OPERATORS

FLOAT = onnx.TensorProto.FLOAT


def without_dynamic_ranges(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return a model whose activations keep their values instead of 8 bits; None if an operator forbids it.

    Each `DynamicQuantizeLinear` gives its input, a scale of 1 and a zero point of 0; each `MatMulInteger` is a `MatMul`
    of numbers less their zero points, in float32.
    """
    exact = onnx.ModelProto.FromString(model.SerializeToString())
    nodes: list[onnx.NodeProto] = []
    for node in exact.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            numbers, scale, zero_point = node.output
            nodes.append(helper.make_node("Identity", [node.input[0]], [numbers]))
            for name, value in ((scale, 1.0), (zero_point, 0.0)):
                constant = helper.make_tensor(name, FLOAT, [], [value])
                nodes.append(helper.make_node("Constant", [], [name], value=constant))
        elif node.op_type == "MatMulInteger":
            nodes += _product(node)
        elif node.op_type in DYNAMIC_OPERATORS or node.op_type.endswith("Integer"):
            return None
        else:
            nodes.append(node)
    del exact.graph.node[:]
    del exact.graph.value_info[:]  # numbers have other types
    exact.graph.node.extend(nodes)
    return exact


def _product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    names: list[str] = []
    nodes: list[onnx.NodeProto] = []
    for index, name in enumerate(node.input[:2]):
        zero_point = node.input[index + 2] if len(node.input) > index + 2 else ""
        for source in filter(None, (name, zero_point)):
            cast = f"{node.output[0]}.{len(nodes)}"
            nodes.append(helper.make_node("Cast", [source], [cast], to=FLOAT))
            names.append(cast)
        if zero_point:
            names[-2:] = [f"{names[-1]}.centred"]
            nodes.append(helper.make_node("Sub", [nodes[-2].output[0], nodes[-1].output[0]], names[-1:]))
    return [*nodes, helper.make_node("MatMul", names, [node.output[0]])]
