"""Replace `Concat(x, x)` by `Tile(x)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.graph.patterns import Replacement, rewrite
from kvsurgeon.graph.query import is_operator
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class ConcatToTile:
    """Replace `Concat(x, x)` by `Tile(x)`, as in rotary tables that are made of one half.

    Before: `Concat(x, x)`. After: `Tile(x)`, with the same result. Compilers that let an operator write into the
    output of its `Concat` fail if the `Concat` reads the operator twice.

    Not handled: vectors, such as shapes, and tensors of unknown rank.
    """

    name: ClassVar[str] = "concat-to-tile"

    def apply(self, subject: Subject) -> Outcome:
        """Rewrite `subject.model`."""
        graph = subject.model.graph
        if not any(_repeats(node) for node in graph):
            return Unchanged(reason="no Concat repeats its input")
        with deep_recursion():
            shapes = shapes_of(graph)

        def pattern(node: ir.Node) -> Replacement | None:
            source = node.inputs[0] if _repeats(node) else None
            rank = 0 if source is None else shapes[source].rank or 0
            return _tile(node, rank) if rank > 1 else None

        edits = rewrite(subject.model, pattern)
        return Changed(edits=edits) if edits else Unchanged(reason="no Concat of rank 2 or more repeats its input")


def _repeats(node: ir.Node) -> bool:
    return is_operator(node, "Concat") and len(node.inputs) > 1 and len(set(node.inputs)) == 1


def _tile(node: ir.Node, rank: int) -> Replacement:
    repeats = np.ones(rank, np.int64)
    repeats[node.attributes["axis"].as_int()] = len(node.inputs)
    output = node.outputs[0]
    return Replacement(
        value=output,
        build=lambda editor: editor.node(
            "Tile", [node.inputs[0], editor.constant(repeats, name="times")], name=f"{output.name}.repeated", like=node
        ),
    )
