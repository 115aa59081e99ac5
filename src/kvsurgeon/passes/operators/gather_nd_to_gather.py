"""Pick rows in the plainest way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class GatherNdToGather:
    """Let a `Gather` pick what a `GatherND` picks by one index alone, which compilers of accelerators may lack.

    Before: `GatherND(data, indices [..., 1])`. After: `Gather(data, indices [...])` along the first axis.

    Not handled: indices of several axes, and those of each batch.
    """

    name: ClassVar[str] = "gather-nd-to-gather"

    def apply(self, subject: Subject) -> Outcome:
        """Replace the operators of `subject.model`."""
        graph = subject.model.graph
        found = [node for node in graph if node.domain == "" and node.op_type == "GatherND" and _picks_rows(node)]
        if not found:
            return Unchanged(reason="no GatherND picks by one index")
        editor = Editor(subject.model)
        for node in found:
            data, indices = node.inputs
            assert indices is not None
            flat = editor.node(
                "Squeeze", [indices, editor.constant([-1])], name=f"{indices.name}.rows", dtype=ir.DataType.INT64
            )
            rows = editor.node("Gather", [data, flat], {"axis": 0}, name="rows", dtype=node.outputs[0].dtype)
            rows.shape = node.outputs[0].shape
            node.outputs[0].replace_all_uses_with(rows)
        editor.finish()
        return Changed(edits=editor.edits)


def _picks_rows(node: ir.Node) -> bool:
    if node.outputs[0].is_graph_output():
        return False
    batch = node.attributes.get("batch_dims")
    indices = node.inputs[1]
    shape = None if indices is None else indices.shape
    return (batch is None or batch.as_int() == 0) and shape is not None and len(shape) > 0 and shape[-1] == 1
