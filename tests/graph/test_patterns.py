"""The driver matches first, edits afterwards, keeps names and removes dead code."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from written import read

from kvsurgeon.graph.patterns import Replacement, rewrite
from kvsurgeon.graph.query import is_operator, producer_of

TEXT = """case (float[n, 4] x, float[n, 4] z) => (float[n, 4] y) {
  r = Reciprocal(z)
  m = Mul(x, r)
  y = Mul(m, r)
}"""


def division(node):
    reciprocal = producer_of(node.inputs[1], "Reciprocal") if is_operator(node, "Mul") else None
    if reciprocal is None:
        return None
    return Replacement(
        value=node.outputs[0],
        build=lambda editor: editor.node(
            "Div", [node.inputs[0], reciprocal.inputs[0]], name=f"{node.outputs[0].name}.quotient", like=node
        ),
    )


def nodes(model):
    return [(node.op_type, [v.name for v in node.inputs], node.outputs[0].name) for node in model.graph]


def test_matches_are_replaced_in_place():
    model = ir.from_proto(read(TEXT))
    model.graph[1].metadata_props["scope"] = "layer.0"
    shape = model.graph[2].outputs[0].shape
    assert rewrite(model, division)
    assert nodes(model) == [("Div", ["x", "z"], "m"), ("Div", ["m", "z"], "y")]
    assert model.graph[0].metadata_props == {"scope": "layer.0"}
    assert model.graph.outputs[0].shape == shape
    onnx.checker.check_model(ir.to_proto(model))
    assert rewrite(model, division) == 0


def test_an_error_in_a_pattern_leaves_the_model_unchanged():
    model = ir.from_proto(read(TEXT))
    before = nodes(model)

    def pattern(node):
        if node.outputs[0].name == "y":
            raise ValueError("unsupported")
        return division(node)

    with pytest.raises(ValueError, match="unsupported"):
        rewrite(model, pattern)
    assert nodes(model) == before


def test_a_value_can_be_replaced_by_an_existing_one():
    model = ir.from_proto(read(TEXT))

    def pattern(node):
        if node.outputs[0].name != "m":
            return None
        return Replacement(value=node.outputs[0], build=lambda _: node.inputs[0], keep_name=False)

    rewrite(model, pattern)
    assert nodes(model) == [("Reciprocal", ["z"], "r"), ("Mul", ["x", "r"], "y")]


def test_one_use_can_be_replaced_alone():
    model = ir.from_proto(read(TEXT))

    def pattern(node):
        if node.outputs[0].name != "y":
            return None
        reciprocal = node.inputs[1]
        return Replacement(
            value=reciprocal, build=lambda editor: editor.node("Abs", [reciprocal], name="abs"), uses=[(node, 1)]
        )

    rewrite(model, pattern)
    assert nodes(model)[-1] == ("Mul", ["m", "abs"], "y")
    assert ("Mul", ["x", "r"], "m") in nodes(model)
