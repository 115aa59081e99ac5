"""Walks over a graph visit each value once, stop as asked, and need no recursion."""

from __future__ import annotations

import onnx_ir as ir
from written import read

from kvsurgeon.graph.query import (
    all_inputs,
    chain,
    downstream,
    find_live,
    is_operator,
    producer_of,
    producers,
    through,
    upstream,
)
from kvsurgeon.ops.content import content_inputs, depends_on_input

TEXT = """case (float[n, 4] x, float[n, 4] z) => (float[n, 4] y) {
  s = Shape(x)
  e = Expand(z, s)
  i = Identity(e)
  c = Cast<to = 1>(i)
  a = Mul(c, x)
  b = Mul(c, c)
  y = Add(a, b)
  dead = Neg(a)
}"""


def values_of(text=TEXT):
    graph = ir.from_proto(read(text)).graph
    found = {value.name: value for value in graph.inputs}
    return graph, found | {value.name: value for node in graph for value in node.outputs}


def names(values):
    return [value.name for value in values]


def test_upstream_yields_each_value_once_nearest_first():
    _, values = values_of()
    assert names(upstream([values["y"], None])) == ["y", "a", "b", "c", "x", "i", "e", "z", "s"]


def test_upstream_stops_at_values():
    _, values = values_of()
    assert names(upstream([values["y"]], stop=lambda value: value.name == "c")) == ["y", "a", "b", "c", "x"]


def test_content_does_not_come_through_shape():
    _, values = values_of()
    assert "x" not in names(upstream([values["e"]], inputs=content_inputs))
    assert "x" in names(upstream([values["e"]]))


def test_downstream_yields_what_is_computed_and_stops_at_nodes():
    _, values = values_of()
    assert names(downstream([values["c"]])) == ["c", "a", "b", "y", "dead"]
    assert names(downstream([values["c"]], stop=lambda node: node.op_type == "Add")) == ["c", "a", "b", "dead"]


def test_producers_are_the_nodes_of_a_walk():
    _, values = values_of()
    assert [node.op_type for node in producers(upstream([values["c"]]))] == ["Cast", "Identity", "Expand", "Shape"]


def test_views_are_skipped_towards_the_producer():
    _, values = values_of()
    assert through(values["c"], {"Cast", "Identity"}) is values["e"]
    assert through(values["c"], lambda node: node.op_type == "Cast") is values["i"]
    assert through(values["x"], {"Cast"}) is values["x"]
    assert names(chain(values["c"], lambda node: node.inputs[0])) == ["c", "i", "e", "z"]
    ended = chain(values["c"], lambda node: node.inputs[0], stop=lambda value: value.name == "i")
    assert names(ended) == ["c", "i"]


def test_operators_are_those_of_the_standard_domain():
    _, values = values_of()
    node = values["a"].producer()
    assert is_operator(node, "Add", "Mul")
    assert producer_of(values["a"], "Mul") is node
    assert producer_of(values["a"], "Add") is producer_of(values["x"], "Mul") is producer_of(None, "Mul") is None
    node.domain = "com.example"
    assert not is_operator(node, "Mul")


def test_only_content_of_inputs_counts_as_dependence():
    _, values = values_of()
    assert depends_on_input(values["b"])
    assert not depends_on_input(values["s"])


def test_dead_code_is_not_live():
    graph, values = values_of()
    live = find_live(graph)
    assert {node.op_type for node in graph} - {node.op_type for node in graph if node in live} == {"Neg"}
    assert values["x"] in live


def test_values_that_subgraphs_capture_are_inputs():
    _, values = values_of(
        """case (bool flag, float[n] x) => (float[n] y) {
          t = Neg(x)
          y = If (flag) <then_branch = a () => (float[n] u) { u = Neg(t) }, else_branch = b () => (float[n] v) {
            v = Identity(t) }>
        }"""
    )
    assert set(names(all_inputs(values["y"].producer()))) == {"flag", "t"}
    assert depends_on_input(values["y"])


def test_depth_does_not_matter():
    x = ir.Value(name="x")
    value, nodes = x, []
    for _ in range(20_000):
        nodes.append(ir.node("Neg", [value]))
        value = nodes[-1].outputs[0]
    assert sum(1 for _ in upstream([value])) == sum(1 for _ in downstream([x])) == 20_001
    assert through(value, {"Neg"}) is x
