"""Replace `GatherND` with one index by `Gather`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.patterns import Replacement, rewrite
from kvsurgeon.graph.query import is_operator
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class GatherNdToGather:
    """Replace `GatherND` with one index by `Gather`, for compilers without `GatherND`.

    Before: `GatherND(data, indices [..., 1])`. After: `Gather(data, indices [...])` along the first axis.

    Not handled: indices of several axes, and `batch_dims`.
    """

    name: ClassVar[str] = "gather-nd-to-gather"

    def apply(self, subject: Subject) -> Outcome:
        """Rewrite `subject.model`."""
        edits = rewrite(subject.model, _gather)
        return Changed(edits=edits) if edits else Unchanged(reason="no GatherND has one index")


def _gather(node: ir.Node) -> Replacement | None:
    output = node.outputs[0]
    if not is_operator(node, "GatherND") or output.is_graph_output() or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    indices = node.inputs[1]
    shape = None if indices is None else indices.shape
    if indices is None or not shape or shape[-1] != 1:
        return None

    def build(editor: Editor) -> ir.Value:
        inputs = [node.inputs[1], editor.constant([-1])]
        rows = editor.node("Squeeze", inputs, name=f"{indices.name}.rows", dtype=ir.DataType.INT64)
        return editor.node("Gather", [node.inputs[0], rows], {"axis": 0}, name="rows")

    return Replacement(value=output, build=build, keep_name=False)
