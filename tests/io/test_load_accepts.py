"""Legal and unusual: these load."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper

from kvsurgeon.errors import InvalidModelError
from kvsurgeon.io import load, to_proto


def test_nodes_in_any_order_are_sorted(proto: onnx.ModelProto) -> None:
    backwards = list(reversed(proto.graph.node))
    del proto.graph.node[:]
    proto.graph.node.extend(backwards)
    assert [node.op_type for node in load(proto).graph] == ["MatMul", "Add"]


def test_nodes_of_a_function_in_any_order_are_sorted(proto: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Neg", ["b"], ["c"]), helper.make_node("Abs", ["a"], ["b"])]
    proto.functions.append(helper.make_function("own", "F", ["a"], ["c"], nodes, [helper.make_opsetid("ai.onnx", 17)]))
    (function,) = load(proto).functions.values()
    assert [node.op_type for node in function] == ["Abs", "Neg"]
    assert function.opset_imports == {"": 17}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TensorProto.STRING, ["a", "b"]),
        (TensorProto.COMPLEX64, [1j, 2j]),
        (TensorProto.COMPLEX128, [1j, 2j]),
        (TensorProto.BFLOAT16, [1.0, 2.0]),
        (TensorProto.FLOAT16, [1.0, 2.0]),
        (TensorProto.BOOL, [True, False]),
        (TensorProto.UINT4, [1, 2]),
        (TensorProto.UINT32, [1, 2]),
        (TensorProto.UINT64, [1, 2]),
        (TensorProto.DOUBLE, [1.0, 2.0]),
    ],
)
def test_every_element_type_has_its_field(proto: onnx.ModelProto, kind: int, values: list[object]) -> None:
    tensor = helper.make_tensor("t", kind, [2], np.array(values) if kind != TensorProto.STRING else values)
    proto.graph.initializer.append(tensor)
    load(proto)
    proto.graph.initializer[-1].dims[:] = [2, 3]
    with pytest.raises(InvalidModelError, match=r"entries in .* - at `t`"):
        load(proto)


def test_custom_operators_can_have_lists_of_tensors_and_graphs(proto: onnx.ModelProto) -> None:
    branch = onnx.parser.parse_graph("g () => (float[n, 4] t) { t = Identity (y) }")
    branch.node[0].doc_string = ""
    branch.node[0].metadata_props.add(key="b", value="1")
    branch.node[0].metadata_props.add(key="a", value="1")
    node = helper.make_node("Op", ["x"], ["z"], domain="own", graphs=[branch], tensors=[proto.graph.initializer[0]])
    proto.graph.node.append(node)
    proto.opset_import.add(domain="own", version=1)
    assert to_proto(load(proto)) == proto
    proto.graph.node[-1].attribute[1].tensors[0].raw_data = b""
    with pytest.raises(InvalidModelError, match="found 0 - at Op `z`"):
        load(proto)


def test_an_initializer_can_be_the_default_of_an_input(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    assert to_proto(load(proto)) == proto
