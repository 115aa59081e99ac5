"""The editor names what it adds, inserts it where it is asked to, and removes dead code."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from written import read

from kvsurgeon.graph.editor import Editor, NodeBuilder

TEXT = """case (float[n, 4] x) => (float[n, 4] y) {
  m = Neg(x)
  y = Abs(m)
}"""


def model_of(text=TEXT):
    return ir.from_proto(read(text))


def test_names_are_unique_and_equal_constants_are_added_once():
    editor = Editor(model_of())
    assert [editor.unique_name("m"), editor.unique_name("m")] == ["m_1", "m_2"]
    assert editor.constant([1, 2]) is editor.constant([1, 2]) is not editor.constant([1, 3])


def test_a_released_name_can_be_given_to_an_output():
    model = model_of()
    editor = Editor(model)
    editor.release_name("m")
    assert model.graph[0].outputs[0].name == "m_inner"
    assert editor.unique_name("m") == "m"


def test_nodes_are_inserted_before_a_node():
    model = model_of()
    absolute = model.graph[1]
    absolute.metadata_props["scope"] = "layer"
    op = NodeBuilder(Editor(model, before=absolute), "y", like=absolute)
    doubled = op.Mul(absolute.inputs[0], op.number(2.0, ir.DataType.FLOAT))
    absolute.replace_input_with(
        0, op.Reshape(op.Cast(doubled, to=ir.DataType.FLOAT), op.int64([-1, 4]), allowzero=None)
    )
    assert [node.op_type for node in model.graph] == ["Neg", "Mul", "Cast", "Reshape", "Abs"]
    assert doubled.name == doubled.producer().name == "y.Mul"
    assert doubled.producer().metadata_props == {"scope": "layer"}
    assert op.Neg(doubled).name == "y.Neg"
    assert op.Neg(doubled).name == "y.Neg_1"
    onnx.checker.check_model(ir.to_proto(model))


def test_only_operators_are_attributes_of_a_builder():
    with pytest.raises(AttributeError):
        NodeBuilder(Editor(model_of()), "y").neg  # noqa: B018


def test_a_node_that_was_removed_reads_nothing():
    """Otherwise a later pass would see a reader that is not in the graph."""
    model = model_of()
    editor = Editor(model)
    kept = model.graph[0].outputs[0]
    NodeBuilder(editor, "dead").Exp(kept)
    assert len(kept.uses()) == 2
    editor.finish()
    assert [node.op_type for node, _ in kept.uses()] == ["Abs"]


def test_a_copy_takes_the_names_of_an_original_that_dies():
    model = model_of()
    editor = Editor(model)
    negative, absolute = model.graph
    copy = editor.copy(negative, [editor.node("Abs", [negative.inputs[0]], name="first")], "copy")
    editor.replace_input(absolute, 0, copy.outputs[0])
    editor.finish()
    assert [node.outputs[0].name for node in model.graph] == ["first", "m", "y"]


@pytest.mark.parametrize("opset", [11, 18])
def test_a_split_fits_the_opset(opset):
    model = ir.from_proto(read(TEXT, opset))
    editor = Editor(model)
    value = model.graph[0].outputs[0]
    assert editor.split(value, [4], 1, name="part") == [value]
    parts = editor.split(value, [1, 3], 1, name="part")
    assert [part.name for part in parts] == ["part_0", "part_1"]
    assert len(parts[0].producer().inputs) == (1 if opset < 13 else 2)


def test_an_initializer_without_uses_stays_if_it_was_unused_before():
    model = model_of()
    unused = ir.Tensor(np.zeros(2, np.float32), name="unused")
    Editor(model).initializer(unused)
    editor = Editor(model)
    editor.constant([1, 2, 3])
    editor.finish()
    assert list(model.graph.initializers) == ["unused"]


def test_an_initializer_that_was_added_and_lost_its_uses_is_removed():
    model = model_of()
    editor = Editor(model)
    first, second = (editor.initializer(ir.Tensor(np.ones(3, np.float32), name=name)) for name in ("first", "second"))
    node = next(iter(model.graph))
    editor.replace_input(node, 0, first)
    editor.replace_input(node, 0, second)

    editor.finish()

    assert "first" not in model.graph.initializers
    assert "second" in model.graph.initializers
