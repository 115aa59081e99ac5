"""An onnx-graphsurgeon function as a pass: everything that it does not change is the same byte for byte."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from decoders import Config, Decoder
from onnx import TensorProto, helper, numpy_helper

import kvsurgeon
from kvsurgeon import io
from kvsurgeon.errors import PassError
from kvsurgeon.interop.node_order import in_original_order, is_sorted
from kvsurgeon.passes.contract import Changed, Unchanged
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.provenance import KEY

TEXT = """
<ir_version: 10, opset_import: ["" : 20, "own" : 1], producer_name: "an exporter", domain: "d", model_version: 3,
 metadata_props: ["origin": "a test", "k": "v"]>
main (float[batch, 4] x, bool flag, float[4] overridable) => (float[batch, 4] y, float[4] constant_output)
<float[4] weight = {1, 2, 3, 4}, float[4] unread = {9, 9, 9, 9}, float[4] only_in_body = {5, 6, 7, 8},
 float[4] overridable = {1, 1, 1, 1}, float[4] constant_output = {2, 2, 2, 2}>
{
  [a] h = Add(x, weight)
  [b] i = own.Twice(h)
  [c] j = If(flag) <
    then_branch = then_graph () => (float[batch, 4] t) <float[4] inner = {1, 0, 0, 0}> {
      t0 = Add(i, inner)
      t = Mul(t0, only_in_body)
    },
    else_branch = else_graph () => (float[batch, 4] e) { e = Identity(i) }
  >
  [d] k = Mul(j, overridable)
  [e] l = Cast <to = 16> (k)
  [f] y = Cast <to = 1> (l)
}
<domain: "own", opset_import: ["" : 20]>
Twice (a) => (b) { two = Constant <value_float = 2.0> ()  b = Mul(a, two) }
"""


@pytest.fixture
def proto():
    model = onnx.parser.parse_model(TEXT)
    for node in model.graph.node:
        node.doc_string = f"what {node.name} is for"
        node.metadata_props.add(key="scope", value=f"layers.{node.name}")
    model.graph.node[2].attribute[0].g.node[0].metadata_props.add(key="scope", value="body")
    model.graph.doc_string = "a graph"
    model.graph.metadata_props.add(key="graph", value="yes")
    model.functions[0].metadata_props.add(key="function", value="yes")
    info = model.graph.value_info.add(name="h", doc_string="hidden")
    info.type.CopyFrom(model.graph.input[0].type)
    info.metadata_props.add(key="kind", value="hidden")
    annotation = model.graph.quantization_annotation.add(tensor_name="h")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="weight")
    onnx.checker.check_model(model)
    return model


@pytest.fixture
def external(tmp_path):
    """A decoder with external data, saved in a folder."""
    path = tmp_path / "given" / "model.onnx"
    path.parent.mkdir()
    model = Decoder(Config()).model()
    for node in model.graph.node:
        node.metadata_props.add(key="scope", value=node.name or "none")
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=64)
    return path


def after(model, *edits):
    """Return the result of functions, without its provenance."""
    result = Pipeline(edits).run(model).model
    result.metadata_props.pop(KEY, None)
    return io.to_proto(result)


def nodes(proto):
    return [node.SerializeToString(deterministic=True) for node in proto.graph.node]


def leaves(graph: gs.Graph) -> None:
    """Touch nothing."""


def copies(graph: gs.Graph) -> gs.Graph:
    return graph.copy()


def sorts(graph: gs.Graph) -> None:
    graph.toposort()


def renames_the_first(graph: gs.Graph) -> None:
    graph.nodes[0].name = "first"


def test_a_function_that_changes_nothing_returns_the_same_model(proto):
    model = io.load(proto)
    result = Pipeline((leaves,)).run(model)
    assert result.model is model
    assert result.steps[0].outcome == Unchanged(reason="the function did not change the graph")


def test_a_copy_of_the_graph_changes_nothing(proto):
    assert nodes(after(proto, copies)) == nodes(proto)


def test_sorting_the_graph_changes_nothing(external):
    """`toposort` lists nodes by their level, which would move equal operators of all layers together."""
    assert nodes(after(external, sorts)) == nodes(onnx.load(external, load_external_data=False))


def test_only_what_was_edited_changes(proto):
    expected = onnx.ModelProto()
    expected.CopyFrom(proto)
    expected.graph.node[0].name = "first"
    expected.graph.node[0].ClearField("domain")  # was set, to nothing
    found = after(proto, renames_the_first)
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_a_changed_node_keeps_its_metadata(proto):
    def swap(graph: gs.Graph) -> None:
        graph.nodes[0].inputs = list(reversed(graph.nodes[0].inputs))

    first = after(proto, swap).graph.node[0]
    assert list(first.input) == ["weight", "x"]
    assert (first.doc_string, first.metadata_props[0].value) == ("what a is for", "layers.a")


def test_new_nodes_follow_the_nodes_that_they_read_from(proto):
    def insert(graph: gs.Graph) -> None:
        add = graph.nodes[0]
        output = add.outputs[0]
        inner = gs.Variable("before_relu", dtype=np.float32)
        add.outputs = [inner]
        graph.nodes.append(gs.Node("Relu", "relu", inputs=[inner], outputs=[output]))

    found = after(proto, insert)
    assert [node.name for node in found.graph.node] == ["a", "relu", "b", "c", "d", "e", "f"]
    assert nodes(found)[2:] == nodes(proto)[1:]
    assert found.graph.node[1].metadata_props == []


def test_a_node_that_replaces_another_does_not_get_its_metadata(proto):
    def replace(graph: gs.Graph) -> None:
        add = graph.nodes[0]
        inputs, outputs = list(add.inputs), list(add.outputs)
        add.outputs.clear()
        graph.nodes.append(gs.Node("Sub", "sub", inputs=inputs, outputs=outputs))
        graph.cleanup()

    first = after(proto, replace).graph.node[0]
    assert (first.op_type, first.doc_string, len(first.metadata_props)) == ("Sub", "", 0)


def test_initializers_keep_their_order_and_unused_ones_stay(proto):
    def cleans(graph: gs.Graph) -> None:
        graph.nodes[0].name = "first"
        graph.cleanup()

    assert [t.name for t in after(proto, cleans).graph.initializer] == [t.name for t in proto.graph.initializer]


def test_an_initializer_that_becomes_unused_is_removed(proto):
    def bypass(graph: gs.Graph) -> None:
        graph.nodes[0].inputs[1] = graph.nodes[0].inputs[0]

    names = [tensor.name for tensor in after(proto, bypass).graph.initializer]
    assert names == [tensor.name for tensor in proto.graph.initializer if tensor.name != "weight"]


def test_a_subgraph_can_be_edited(proto):
    def edit(graph: gs.Graph) -> None:
        body = graph.nodes[2].attrs["then_branch"]
        body.nodes[1].inputs[1] = gs.Constant("fresh", np.ones(4, np.float32))

    found = after(proto, edit)
    body, before = found.graph.node[2].attribute[0].g, proto.graph.node[2].attribute[0].g
    assert list(body.node[1].input) == ["t0", "fresh"]
    assert body.node[0].SerializeToString() == before.node[0].SerializeToString()
    assert [tensor.name for tensor in body.initializer] == ["inner"]
    assert found.graph.node[2].doc_string == "what c is for"
    assert {"fresh"} == {t.name for t in found.graph.initializer} - {t.name for t in proto.graph.initializer}


def test_a_local_function_can_be_edited_and_keeps_its_metadata(proto):
    def edit(graph: gs.Graph) -> None:
        graph.functions[0].nodes[1].name = "doubling"

    function = after(proto, edit).functions[0]
    assert function.node[1].name == "doubling"
    assert function.metadata_props[0].key == "function"


def test_a_changed_type_keeps_its_metadata(proto):
    def edit(graph: gs.Graph) -> None:
        graph.tensors()["h"].shape = [2, 4]

    info = next(info for info in after(proto, edit).graph.value_info if info.name == "h")
    assert [dim.dim_value for dim in info.type.tensor_type.shape.dim] == [2, 4]
    assert (info.doc_string, info.metadata_props[0].value) == ("hidden", "hidden")


def test_operators_of_a_new_domain_are_imported(proto):
    def edit(graph: gs.Graph) -> None:
        gelu = graph.nodes[3]
        gelu.op, gelu.domain = "BiasGelu", "com.microsoft"

    assert {opset.domain: opset.version for opset in after(proto, edit).opset_import} == {
        "": 20, "own": 1, "com.microsoft": 1,
    }  # fmt: skip


# Weights


def test_weights_stay_in_their_file_and_are_not_read(external, monkeypatch):
    def fail(self):
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(ir.ExternalTensor, "_load", fail)
    model = Pipeline((renames_the_first,)).run(external).model
    before = onnx.load(external, load_external_data=False)
    found = io.to_proto(model)
    assert [t.SerializeToString() for t in found.graph.initializer] == [
        t.SerializeToString() for t in before.graph.initializer
    ]
    assert nodes(found)[1:] == nodes(before)[1:]


def test_weights_can_be_read(external):
    sums = {}

    def look(graph: gs.Graph) -> None:
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant):
                sums[tensor.name] = float(np.sum(tensor.values, dtype=np.float64))
        graph.nodes[0].name = "first"

    found = io.to_proto(Pipeline((look,)).run(external).model)
    whole = onnx.load(external)
    expected = {t.name: float(np.sum(numpy_helper.to_array(t), dtype=np.float64)) for t in whole.graph.initializer}
    assert sums == {name: expected[name] for name in sums}
    assert len(sums) > 20
    before = onnx.load(external, load_external_data=False)
    assert [t.SerializeToString() for t in found.graph.initializer] == [
        t.SerializeToString() for t in before.graph.initializer
    ]


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_can_be_changed(external, tmp_path, in_place):
    changed = []

    def double(graph: gs.Graph) -> None:
        weight = next(c for c in graph.tensors().values() if isinstance(c, gs.Constant) and c.dtype == np.float32)
        changed.append(weight.name)
        if in_place:
            weight.values[:] = weight.values * 2
        else:
            weight.values = weight.values * 2

    result = Pipeline((double,)).run(external)
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(external).graph.initializer}
    kvsurgeon.save(result.model, tmp_path / "out", source=external)
    written = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    found = {name: value.const_value.numpy() for name, value in written.items()}
    np.testing.assert_array_equal(found[changed[0]], before[changed[0]] * 2)
    assert all(np.array_equal(found[name], before[name]) for name in before if name != changed[0])


@pytest.mark.parametrize(
    "dtype", [TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.STRING]
)
def test_weights_of_all_types_are_unchanged(dtype):
    values = [b"a", b"b"] if dtype == TensorProto.STRING else [1, 2]
    tensor = helper.make_tensor("w", dtype, [2], values)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"], "n")],
        "g",
        [],
        [helper.make_tensor_value_info("y", dtype, [2])],
        [tensor],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def touch(graph: gs.Graph) -> None:
        graph.nodes[0].name = "touched"

    assert after(proto, touch).graph.initializer[0].SerializeToString() == tensor.SerializeToString()


def test_a_weight_can_be_exported_as_another_type(proto):
    import ml_dtypes

    def edit(graph: gs.Graph) -> None:
        graph.nodes[0].inputs[1] = gs.Constant("rounded", np.array([1, 2, 3, 4], ml_dtypes.bfloat16))

    tensor = next(t for t in after(proto, edit, cast_back).graph.initializer if t.name == "rounded")
    assert tensor.data_type == TensorProto.BFLOAT16


def cast_back(graph: gs.Graph) -> None:
    add = next(node for node in graph.nodes if node.op == "Add")
    cast = gs.Variable("cast_back", dtype=np.float32)
    graph.nodes.append(gs.Node("Cast", "cast_back", {"to": 1}, inputs=[add.inputs[1]], outputs=[cast]))
    add.inputs = [add.inputs[0], cast]


# What a function may answer


def test_a_result_that_is_not_a_graph_is_an_error(proto):
    def answers(graph: gs.Graph):
        return graph.nodes

    with pytest.raises(PassError, match=r"pass answers raised TypeError: expected it to return a gs.Graph or None"):
        Pipeline((answers,)).run(proto)


def test_edits_are_counted(proto):
    def two(graph: gs.Graph) -> None:
        graph.nodes[0].name, graph.nodes[1].name = "one", "two"

    outcome = Pipeline((two,)).run(proto).steps[0].outcome
    assert outcome == Changed(edits=2)


def test_further_parameters_are_options(proto):
    def name(graph: gs.Graph, *, called: str, times: int = 2) -> None:
        graph.nodes[0].name = called * times

    from kvsurgeon.interop.functions import as_pass_class

    made = as_pass_class(name)
    assert after(proto, made(called="x", times=3)).graph.node[0].name == "xxx"


def test_nothing_is_printed(proto, capsys):
    after(proto, renames_the_first)
    assert capsys.readouterr() == ("", "")


# Order


def node(output, *inputs):
    return helper.make_node("Op", list(inputs), [output])


def test_old_nodes_keep_their_order_and_new_ones_follow_their_inputs():
    listed = [node("c", "b"), node("new2", "new1"), node("a"), node("b", "a"), node("new1", "a"), node("new0")]
    found = in_original_order(listed, [2, None, 0, 1, None, None])
    assert [one.output[0] for one in found] == ["new2", "new0", "a", "new1", "b", "c"]
    assert not is_sorted(found)  # new2 is before its input: sorting the graph corrects that
    assert is_sorted(sorted(found, key=lambda one: one.output[0] == "new2"))


def test_a_subgraph_can_read_values_of_its_graph():
    read = helper.make_graph([helper.make_node("Op", ["a"], ["inner"])], "g", [], [])
    outer = helper.make_node("If", ["flag"], ["y"], then_branch=read)
    assert is_sorted([node("a"), outer])
    assert not is_sorted([outer, node("a")])
