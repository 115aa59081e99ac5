"""Everything that no pass changed is the same byte for byte."""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from kvsurgeon.io import load, to_proto

TEXT = """
<ir_version: 10, opset_import: ["own" : 1, "ai.onnx" : 20], producer_name: "p", producer_version: "1",
 model_version: 3, doc_string: "d">
g (float[n, 4] x, bool c) => (float[n, 4] y, float[n, 4] z) <float[n, 4] b, float[n, 4] a, float[4] w = {1, 2, 3, 4}> {
  a = Mul (x, w)
  b = own.Twice <factor: float = 2.0> (a)
  y = Dropout (b)
  z = If (c) <
    then_branch = t () => (float[n, 4] t2) <float[n, 4] t1, float[1] one = {1}> {
      t1 = Identity (b)
      t2 = Add (t1, one)
    },
    else_branch = e () => (float[n, 4] e1) { e1 = Neg (a) }
  >
}
<domain: "own", opset_import: ["" : 20]>
Twice <factor> (p) => (r) { q = Constant <value = float {2.0}> () r = Mul (p, q) }
"""


def pairs(entries: object, **values: str) -> None:
    for key, value in values.items():
        entries.add(key=key, value=value)  # type: ignore[attr-defined]


@pytest.fixture
def rich() -> onnx.ModelProto:
    """A model with something in every place in which onnx-ir, or a careless writer, loses something."""
    model = onnx.parser.parse_model(TEXT)
    graph = model.graph
    first, dropout, function = graph.node[0], graph.node[2], model.functions[0]
    for holder in (model, graph, first, function, function.node[1], graph.input[0], graph.initializer[0]):
        pairs(holder.metadata_props, zebra="1", ant="2")  # not in the order of the alphabet
    for node in graph.node:
        node.domain = node.domain or "ai.onnx"
        node.doc_string = ""
    graph.doc_string = ""
    first.name = "first"
    dropout.output.append("")  # the mask, not wanted
    first.attribute.append(helper.make_attribute("zero", 0))
    first.attribute[0].ClearField("i")
    constant = helper.make_tensor("t", TensorProto.FLOAT, [1], [0.0])
    pairs(constant.metadata_props, zebra="1", ant="2")
    graph.node.append(helper.make_node("Constant", [], ["k"], value=constant))
    external = helper.make_tensor("far", TensorProto.FLOAT, [2], bytes(8), raw=True)
    external.ClearField("raw_data")
    external.data_location = TensorProto.EXTERNAL
    pairs(external.external_data, checksum="abc", length="8", location="far.data", offset="0")
    graph.initializer.append(external)
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    graph.sparse_initializer.append(
        helper.make_sparse_tensor(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]), indices, [4])
    )
    for name in ("b", "w"):
        annotation = graph.quantization_annotation.add(tensor_name=name)
        pairs(annotation.quant_parameter_tensor_names, ZERO_POINT_TENSOR="z", SCALE_TENSOR="s")
    float_4 = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 4])
    for name in ("y", "nothing", "x"):  # an output, an undefined name, and an input
        graph.value_info.append(helper.make_value_info(name, float_4))
    graph.value_info.add(name="k")
    graph.value_info.append(graph.value_info[0])  # twice
    function.value_info.extend([helper.make_value_info(name, float_4) for name in ("q", "p")])
    model.training_info.add().update_binding.add(key="w", value="a")
    return model


def test_an_unchanged_model_is_the_same_bytes(rich: onnx.ModelProto) -> None:
    before = rich.SerializeToString(deterministic=True)
    assert to_proto(load(rich)).SerializeToString(deterministic=True) == before


def test_the_test_above_can_detect_changes(rich: onnx.ModelProto) -> None:
    before = rich.SerializeToString(deterministic=True)
    assert ir.to_proto(ir.from_proto(rich)).SerializeToString(deterministic=True) != before


def test_the_given_proto_is_not_changed(rich: onnx.ModelProto) -> None:
    before = rich.SerializeToString(deterministic=True)
    model = load(rich)
    next(iter(model.graph)).metadata_props["new"] = "1"
    model.graph.inputs[0].name = "renamed"
    model.graph.initializers["w"].name = "renamed_too"
    to_proto(model)
    assert rich.SerializeToString(deterministic=True) == before


def test_the_default_domain_has_one_name_in_the_ir(rich: onnx.ModelProto) -> None:
    assert load(rich).opset_imports == {"own": 1, "": 20}


def test_one_edit_changes_one_node(rich: onnx.ModelProto) -> None:
    model = load(rich)
    node = model.graph.node("first")
    node.attributes["zero"] = ir.AttrInt64("zero", 7)
    nodes = to_proto(model).graph.node
    assert [old == new for old, new in zip(rich.graph.node, nodes, strict=True)] == [False, True, True, True, True]
    assert nodes[0].attribute[0].i == 7


def test_an_edit_in_a_subgraph_changes_nothing_else(rich: onnx.ModelProto) -> None:
    pairs(rich.graph.node[3].attribute[0].g.node[0].metadata_props, zebra="1", ant="2")
    model = load(rich)
    branch = list(model.graph)[3].attributes["then_branch"].as_graph()
    branch[1].metadata_props["edited"] = "yes"
    inner = to_proto(model).graph.node[3].attribute[0].g
    before = rich.graph.node[3].attribute[0].g
    assert inner.node[0] == before.node[0]
    assert inner.node[1] != before.node[1]
    assert inner.value_info == before.value_info


def test_infos_are_those_of_existing_values(rich: onnx.ModelProto) -> None:
    model = load(rich)
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    by_name["a"].shape = ir.Shape(["m", 4])
    by_name["b"].shape = by_name["b"].type = None
    by_name["y"].shape = ir.Shape(["m", 4])
    by_name["k"].name = "renamed"
    infos = {info.name: info for info in to_proto(model).graph.value_info}
    assert infos["a"].type.tensor_type.shape.dim[0].dim_param == "m"
    assert "b" not in infos  # its type is no longer known
    assert "y" not in infos  # the info of the output has changed
    assert "x" in infos
    assert "nothing" in infos


def test_new_domains_come_last_and_versions_follow(rich: onnx.ModelProto) -> None:
    model = load(rich)
    model.opset_imports["com.microsoft"] = 1
    model.opset_imports[""] = 21
    del model.opset_imports["own"]
    imports = to_proto(model).opset_import
    assert [(opset.domain, opset.version) for opset in imports] == [("ai.onnx", 21), ("com.microsoft", 1)]


def test_a_model_that_was_not_loaded_has_a_proto_too(proto: onnx.ModelProto) -> None:
    assert [list(node.output) for node in to_proto(ir.from_proto(proto)).graph.node] == [["h"], ["y"]]
