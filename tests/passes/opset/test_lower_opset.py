"""lower-opset converts operators to an earlier opset, and rejects those without an equivalent there."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from exports import ONE_OF_EACH, export
from laws import difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.opset.lower_opset import LowerOpset
from kvsurgeon.passes.opset.raise_opset import RaiseOpset


def lowered(model: onnx.ModelProto, opset: int = 17) -> onnx.ModelProto:
    subject = Subject.of(model)
    assert isinstance(LowerOpset(opset=opset).apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result, full_check=True)
    assert {entry.domain: entry.version for entry in result.opset_import}[""] == opset
    return result


@pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if not name.startswith("gemma2")])  # it has a Gelu
def test_raised_and_lowered_exports_give_bitwise_equal_results(name):
    model, feeds = export(name), texts(export(name))
    subject = Subject.of(model)
    RaiseOpset(opset=21).apply(subject)
    expected, found = (in_onnxruntime(one)(feeds)["logits"] for one in (model, lowered(io.to_proto(subject.model))))
    assert difference(found, expected) == 0


def test_inputs_that_were_attributes_are_converted():
    text = """case (float[b, n, 8] x) => (float[b, n, 1] a, float[b, n, 4] c, float[b, n, 4] d, int64[b, n, 8] e)
    <int64[1] axes = {2}>
    {
      a = ReduceMean(x, axes)
      c, d = Split<axis = 2, num_outputs = 2>(x)
      e = Cast<to = 7, saturate = 1>(x)
    }"""
    model = read(text, opset=20)
    result = lowered(model)
    mean, split, cast = result.graph.node
    assert (list(mean.input), [list(a.ints) for a in mean.attribute if a.name == "axes"]) == (["x"], [[2]])
    assert {a.name: a.i for a in split.attribute} == {"axis": 2}
    assert {a.name: a.i for a in cast.attribute} == {"to": 7}
    assert (result.ir_version, [tensor.name for tensor in result.graph.initializer]) == (8, [])
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    expected, found = (in_onnxruntime(one)({"x": x}) for one in (model, result))
    assert all((expected[name] == found[name]).all() for name in expected)


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("node", [
    "LayerNormalization<axis = -1, epsilon = 0.01>(x, v, w)", "LayerNormalization<axis = 1>(x, m)",
    "Gelu(x)", "Gelu<approximate = \"tanh\">(x)",
])  # fmt: skip
def test_operators_of_later_opsets_are_decomposed(node, dtype):
    inputs = f"{dtype}[b, 4, 8] x, {dtype}[8] v, {dtype}[8] w, {dtype}[4, 8] m"
    model = read(f"case ({inputs}) => ({dtype}[b, 4, 8] y) {{ y = {node} }}", 20)
    result = lowered(model, 16)
    assert not {"LayerNormalization", "Gelu"} & {one.op_type for one in result.graph.node}
    generator, kind = np.random.default_rng(0), np.float16 if dtype == "float16" else np.float32
    feeds = {name: generator.standard_normal(shape).astype(kind) for name, shape in (
        ("x", (2, 4, 8)), ("v", (8,)), ("w", (8,)), ("m", (4, 8)),
    )}  # fmt: skip
    expected, found = (in_onnxruntime(one)(feeds)["y"] for one in (model, result))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if kind is np.float32 else 2e-2)


@pytest.mark.parametrize(
    ("text", "opset", "reason"),
    [
        ("y = Mish(x)", 20, "Mish has no equivalent in opset 17, found an operator of a later opset"),
        ("y = GroupNormalization<num_groups = 2>(x, v, v)", 21, "an operator of a later opset"),
        ("y = DFT(x)", 20, "an operator with another meaning"),
        ("s = Shape<start = 2>(x) a = Range(zero, two, two) y = ReduceMean(x, a)", 20, "axes, which is not a constant"),
        ("a, b, y = Split<axis = 2, num_outputs = 3>(x)", 20, "num_outputs=3"),
        ("y = Cast<to = 1, saturate = 0>(x)", 20, "saturate=0"),
        ("i = Cast<to = 17>(x) y = Cast<to = 1>(i)", 20, "float8e4m3fn"),
        ("i = Cast<to = 21>(x) j = Reshape(i, shape) y = Cast<to = 1>(j)", 21, r"tensor\(uint4\)"),
    ],
)
def test_nodes_without_an_equivalent_are_rejected(text, opset, reason):
    given = "<float[4] v, int64 zero = {0}, int64 two = {2}, int64[3] shape = {0, 0, 0}>"
    model = read(f"case (float[b, 4, 8] x) => (float[b, 4, c] y) {given} {{ {text} }}", opset)
    subject = Subject.of(onnx.shape_inference.infer_shapes(model))
    before = io.to_proto(subject.model)
    with pytest.raises(UnsupportedError, match=reason):
        LowerOpset().apply(subject)
    assert io.to_proto(subject.model) == before


def test_an_earlier_opset_is_unchanged():
    assert isinstance(LowerOpset().apply(Subject.of(export("llama_torchscript_sdpa"))), Unchanged)


def test_opsets_before_13_are_rejected():
    with pytest.raises(UnsupportedError, match="found opset 12"):
        LowerOpset(opset=12).apply(Subject.of(export("llama_torchscript_sdpa")))


def test_the_ir_version_is_lowered_without_the_opset():
    model = read("case (float[b, n, 8] x) => (float[b, n, 8] y) { y = Relu(x) }", opset=17)
    model.ir_version = 10
    assert lowered(model).ir_version == 8
    assert isinstance(LowerOpset(opset=17).apply(Subject.of(lowered(model))), Unchanged)


def test_imports_of_unused_domains_are_removed():
    model = read("case (float[b, n, 8] x) => (float[b, n, 8] y) { y = com.microsoft.Gelu(x) }", opset=17)
    del model.opset_import[:]
    model.opset_import.extend(
        onnx.helper.make_opsetid(domain, version)
        for domain, version in {"": 17, "ai.onnx.ml": 5, "com.microsoft": 1}.items()
    )
    assert {entry.domain for entry in lowered(model).opset_import} == {"", "com.microsoft"}
