"""A new operator is one entry: an operator of a later opset, and one of another domain."""

from __future__ import annotations

import sys
from pkgutil import resolve_name

import onnx_ir as ir
import pytest
from packages import install
from written import read

from kvsurgeon.analysis.analysis import analyze
from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.decompose import decompose
from kvsurgeon.errors import Code, PluginError, UnsupportedError
from kvsurgeon.ops import Operator, operator_of, registered, table
from kvsurgeon.ops.elementwise import unary
from kvsurgeon.ops.operator import kept

SWISH = Operator(domain="my.company", op_type="Swish", shape=unary, axes=kept)

DECODER = """case (int64[b, n] input_ids) => (float[b, n, 16] logits)
<float[16, 8] table, float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 16] head, float half = {{0.5}},
 int64 zero = {{0}}, int64 one = {{1}}, float low = {{-1e9}}>
{{
  x = Gather(table, input_ids)
  h = {operator}
  q = MatMul(h, wq)
  k = MatMul(h, wk)
  v = MatMul(h, wv)
  kt = Transpose<perm = [0, 2, 1]>(k)
  scores = MatMul(q, kt)
  shape = Shape(input_ids)
  n = Gather(shape, one)
  row = Range(zero, n, one)
  column = Unsqueeze(row, axis)
  later = Less(column, row)
  masked = Where(later, low, scores)
  weights = Softmax<axis = -1>(masked)
  visible = MatMul(weights, v)
  logits = MatMul(visible, head)
}}"""


def decoder(operator, opset=20):
    text = DECODER.format(operator=operator).replace("float low", "int64[1] axis = {1}, float low")
    return ir.from_proto(read(text, opset=opset))


def prepend(monkeypatch, site):
    monkeypatch.syspath_prepend(str(site))
    for name in [name for name in sys.modules if name.partition(".")[0] == "sample_passes"]:
        monkeypatch.delitem(sys.modules, name)


def test_an_unknown_operator_is_rejected_with_the_page_that_says_how_to_add_it():
    with pytest.raises(UnsupportedError, match=r"unknown operator my\.company::Swish") as error:
        analyze(decoder("my.company.Swish(x)"))
    assert error.value.code is Code.UNKNOWN_OPERATOR
    assert "docs/writing-an-operator.md" in str(error.value)


def test_a_registered_operator_is_known_inside_the_block_only():
    model = decoder("my.company.Swish(x)")
    with registered(SWISH):
        assert len(analyze(model).sites) == 1
    with pytest.raises(UnsupportedError, match="unknown operator"):
        analyze(model)


def test_an_installed_package_brings_operators(tmp_path, monkeypatch):
    prepend(monkeypatch, install("sample", tmp_path))
    table.installed_operators.cache_clear()
    try:
        assert len(analyze(decoder("my.company.Swish(x)")).sites) == 1
    finally:
        table.installed_operators.cache_clear()


def test_entries_that_cannot_be_loaded_are_named(tmp_path, monkeypatch):
    site = install("sample", tmp_path)
    (site / "sample_passes" / "operators.py").write_text("def operators():\n    return ['Swish']\n")
    prepend(monkeypatch, site)
    table.installed_operators.cache_clear()
    try:
        with pytest.raises(PluginError, match="operators of sample-passes: expected entries of type Operator"):
            table.find("my.company", "Swish")
    finally:
        table.installed_operators.cache_clear()


def decompose_swish(op):
    x = op.input(0)
    op.finish(op.Mul(x, op.Sigmoid(x)))


def test_an_operator_with_a_decomposition_is_written_in_standard_operators():
    fused = Operator(
        domain="my.company", op_type="Swish", shape=unary, decomposition=f"{__name__}:{decompose_swish.__name__}"
    )
    with registered(fused):
        result = decompose(decoder("my.company.Swish(x)")).model
    assert {"Mul", "Sigmoid"} <= {node.op_type for node in result.graph}
    assert not {node.op_type for node in result.graph} & {"Swish"}
    assert len(analyze(result).sites) == 1


def test_a_decomposition_that_cannot_be_loaded_is_named():
    broken = Operator(domain="my.company", op_type="Swish", shape=unary, decomposition="missing_package.fused:swish")
    with registered(broken), pytest.raises(PluginError, match=r"missing_package\.fused:swish: ModuleNotFoundError"):
        decompose(decoder("my.company.Swish(x)"))


@pytest.mark.parametrize("operator", [one for one in table.BUILT_IN if one.decomposition])
def test_built_in_decompositions_exist(operator):
    assert callable(resolve_name(operator.decomposition))


def test_linear_attention_has_shapes_and_mixes_tokens():
    linear = "LinearAttention<q_num_heads = 2, kv_num_heads = 1>(x, narrow, narrow)"
    text = DECODER.format(operator=linear).replace("float low", "int64[1] axis = {1}, float low")
    text = text.replace("float[8, 8] wq", "float[8, 4] wn, float[8, 8] wq").replace(
        "  h = Linear", "  narrow = MatMul(x, wn)\n  h = Linear"
    )
    model = ir.from_proto(read(text, opset=27))
    node = next(node for node in model.graph if node.op_type == "LinearAttention")
    assert operator_of(node) is not None
    assert str(shapes_of(model.graph)[node.outputs[0]].shape) == "(batch, length, 8)"
