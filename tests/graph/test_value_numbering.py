"""Equal expressions get equal numbers, and different ones different numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from written import read

from kvsurgeon.graph.value_numbering import ValueNumbering, constant_key


def values_of(body):
    graph = ir.from_proto(read(f"case (float[n, 4] x, float[n, 4] z) => (float[n, 4] y) {{ {body} y = Neg(x) }}")).graph
    return {value.name: value for node in graph for value in node.outputs} | {v.name: v for v in graph.inputs}


SAME = [
    "a = Neg(x) b = Neg(x)",
    "a = Softmax<axis = 1>(x) b = Softmax<axis = 1>(x)",
    "c = Constant<value_ints = [0, 4]>() d = Constant<value_ints = [0, 4]>() a = Reshape(x, c) b = Reshape(x, d)",
    "c = Neg(x) d = Neg(x) a = Add(c, z) b = Add(d, z)",
    "a = Clip(x, , z) b = Clip(x, , z)",
    "s = Shape(x) a = ConstantOfShape<value = float[1] {2}>(s) b = ConstantOfShape<value = float[1] {2}>(s)",
]
DIFFERENT = [
    "a = Neg(x) b = Neg(z)",
    "a = Neg(x) b = Abs(x)",
    "a = Sub(x, z) b = Sub(z, x)",
    "a = Clip(x, , z) b = Clip(x, z)",
    "a = Softmax<axis = 1>(x) b = Softmax<axis = 0>(x)",
    "c = Constant<value_ints = [0, 4]>() d = Constant<value_ints = [4, 0]>() a = Reshape(x, c) b = Reshape(x, d)",
    "a = RandomNormalLike(x) b = RandomNormalLike(x)",
    "a, b = Split<axis = 1, num_outputs = 2>(x)",
    "s = Shape(x) a = ConstantOfShape<value = float[1] {2}>(s) b = ConstantOfShape<value = float[1] {3}>(s)",
]


@pytest.mark.parametrize("body", SAME)
def test_equal_expressions_have_one_number(body):
    values, numbering = values_of(body), ValueNumbering()
    assert numbering[values["a"]] == numbering[values["b"]]
    assert numbering.representatives([values["a"], values["b"]]) == {values["b"]: values["a"]}


@pytest.mark.parametrize("body", DIFFERENT)
def test_different_expressions_have_two_numbers(body):
    values, numbering = values_of(body), ValueNumbering()
    assert numbering[values["a"]] != numbering[values["b"]]
    assert not numbering.representatives([values["a"], values["b"]])


def test_leaves_and_operands_are_as_the_caller_says():
    values = values_of("a = Neg(x) b = Neg(z) c = Mul(a, x) d = Mul(a, z)")
    numbering = ValueNumbering(lambda value: "input" if value.producer() is None else None)
    assert numbering[values["a"]] == numbering[values["b"]]
    numbering = ValueNumbering(operand=lambda node, index: "any" if index == 1 else None)
    assert numbering[values["c"]] == numbering[values["d"]] != numbering[values["a"]]


def test_instances_that_share_keys_are_comparable():
    values, keys = values_of("a = Neg(x) b = Neg(z)"), {}
    first = ValueNumbering(lambda value: "input" if value is values["x"] else None, keys=keys)
    second = ValueNumbering(lambda value: "input" if value is values["z"] else None, keys=keys)
    assert first[values["a"]] == second[values["b"]] != first[values["b"]]


def test_large_constants_are_compared_by_identity():
    tensors = [ir.Tensor(np.zeros(10_000, np.float32)) for _ in range(2)]
    values = [ir.node("Constant", [], {"value": tensor}).outputs[0] for tensor in (*tensors, tensors[0])]
    numbering = ValueNumbering()
    assert constant_key(values[0]) is None
    assert numbering[values[0]] == numbering[values[2]] != numbering[values[1]]


def test_a_constant_whose_file_is_missing_is_compared_by_identity(tmp_path):
    tensors = [
        ir.ExternalTensor("none", 0, 16, ir.DataType.INT64, shape=ir.Shape([2]), name="t", base_dir=tmp_path)
        for _ in range(2)
    ]
    values = [ir.node("Constant", [], {"value": tensor}).outputs[0] for tensor in tensors]
    numbering = ValueNumbering()
    assert numbering[values[0]] != numbering[values[1]]


def test_depth_does_not_matter():
    x = ir.Value(name="x")
    ends = []
    for _ in range(2):
        value = x
        for _ in range(5_000):
            value = ir.node("Neg", [value]).outputs[0]
        ends.append(value)
    numbering = ValueNumbering()
    assert numbering[ends[0]] == numbering[ends[1]]
