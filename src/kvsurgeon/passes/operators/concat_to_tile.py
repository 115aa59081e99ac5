"""Write what is joined to itself as a repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import shapes_of
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class ConcatToTile:
    """Let a `Tile` repeat what a `Concat` joins to itself.

    Before: `Concat(x, x)`, as tables of rotations are made of one half. After: `Tile(x)`, which gives the same numbers.
    A compiler that lets the maker of a tensor write into the place where it is joined has no one place for it.

    Not handled: vectors, as shapes are, and what has no known rank.
    """

    name: ClassVar[str] = "concat-to-tile"

    def apply(self, subject: Subject) -> Outcome:
        """Rewrite the repetitions of `subject.model`."""
        graph = subject.model.graph
        joins = [node for node in graph if _joins_itself(node)]
        if joins:
            with deep_recursion():
                shapes = shapes_of(graph)
            ranks = {node: shapes[node.inputs[0]].rank or 0 for node in joins if node.inputs[0] is not None}
            joins = [node for node in joins if ranks[node] > 1]
        if not joins:
            return Unchanged(reason="nothing is joined to itself")
        editor = Editor(subject.model)
        for node in joins:
            old = node.outputs[0]
            times = np.ones(ranks[node], np.int64)
            times[node.attributes["axis"].as_int()] = len(node.inputs)
            tiled = ir.Value(name=editor.unique_name(f"{old.name}.repeated"), type=old.type, shape=old.shape)
            inputs = [node.inputs[0], editor.constant(times, name="times")]
            editor.operator("", "Tile", inputs, {}, [tiled], like=node)
            editor.replace(old, tiled)
        editor.finish()
        return Changed(edits=editor.edits)


def _joins_itself(node: ir.Node) -> bool:
    concat = node.op_type == "Concat" and node.domain in ("", "ai.onnx")
    return concat and len(node.inputs) > 1 and len(set(node.inputs)) == 1
