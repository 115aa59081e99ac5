"""Replace causal convolutions of each channel by one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import is_operator
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class FuseCausalConvs:
    """Replace causal convolutions of each channel by `CausalConvWithState` of com.microsoft.

    Before: `Conv` with a group for each channel, padded by its width - 1 in front, and the `Slice` that drops the rows
    of the padding behind. After: one operator, whose CPU kernel takes an eighth of the time in a decode step. It is
    given no state: the `conv_state` of the cache stays joined in front of its input.

    Not handled: other types than float32, strides and dilations. Run it after the passes that change the cache.
    """

    name: ClassVar[str] = "fuse-causal-convs"

    def apply(self, subject: Subject) -> Outcome:
        """Fuse the causal convolutions of `subject.model`."""
        with deep_recursion():
            shapes = shapes_of(subject.model.graph)
        found = [(node, result) for node in subject.model.graph if (result := _result(shapes, node)) is not None]
        if not found:
            return Unchanged(reason="no causal convolution of each channel in float32")
        editor = Editor(subject.model)
        for node, result in found:
            _fuse(editor, node, result)
        editor.finish()
        return Changed(edits=editor.edits)


def _result(shapes: Shapes, node: ir.Node) -> ir.Value | None:
    """Return the value that holds the rows of a causal convolution, one for each row of its input."""
    if not is_operator(node, "Conv") or shapes[node.outputs[0]].dtype is not ir.DataType.FLOAT:
        return None
    pads = _front_and_end(shapes, node)
    if pads is None:
        return None
    if pads[1] == 0:
        return node.outputs[0]
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or node.outputs[0].is_graph_output() or not is_operator(uses[0][0], "Slice"):
        return None
    cut, call = uses[0][0], shapes.call(uses[0][0])
    starts, axes, steps = (call.numbers(index) for index in (1, 3, 4))
    is_front = starts == (0,) and axes in ((2,), (-1,)) and steps in (None, (1,))
    given, kept = (shapes[value].shape for value in (node.inputs[0], cut.outputs[0]) if value is not None)
    return cut.outputs[0] if is_front and given is not None and given == kept else None


def _front_and_end(shapes: Shapes, node: ir.Node) -> tuple[int, int] | None:
    """Return the padding of a convolution of each channel that no later row counts in; None for others."""
    weight = None if node.inputs[1] is None else shapes[node.inputs[1]].shape
    if weight is None or len(weight) != 3 or node.attributes.get_int("group", 1) != weight[0] or weight[1] != 1:
        return None
    plain = [*(node.attributes.get_ints("strides") or ()), *(node.attributes.get_ints("dilations") or ())]
    pads = node.attributes.get_ints("pads") or (0, 0)
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET" or any(one != 1 for one in plain):
        return None
    return (pads[0], pads[1]) if isinstance(weight[2], int) and pads[0] == weight[2] - 1 and pads[1] >= 0 else None


def _fuse(editor: Editor, node: ir.Node, result: ir.Value) -> None:
    editor.before = node
    rows = ir.Value(name=editor.unique_name(f"{result.name}.causal"), type=result.type, shape=result.shape)
    outputs = [rows, ir.Value(name=editor.unique_name(f"{result.name}.last_rows"))]  # which onnxruntime demands
    editor.operator("com.microsoft", "CausalConvWithState", list(node.inputs), {"ndim": 1}, outputs, node)
    editor.replace(result, rows)
