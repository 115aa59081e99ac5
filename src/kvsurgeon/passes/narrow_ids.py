"""Take whole numbers as compilers of accelerators want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class NarrowIds:
    """Give every input of 64-bit integers as one of 32 bits.

    Before: `input_ids` of int64. After: of int32, made wider in the graph.

    Not handled: numbers that 32 bits do not hold.
    """

    name: ClassVar[str] = "narrow-ids"

    def apply(self, subject: Subject) -> Outcome:
        """Narrow the inputs of `subject.model`."""
        graph = subject.model.graph
        wide = [value for value in graph.inputs if value.dtype is ir.DataType.INT64]
        if not wide:
            return Unchanged(reason="no input holds integers of 64 bits")
        editor = Editor(subject.model)
        for value in wide:
            users = tuple(value.uses())
            value.dtype = ir.DataType.INT32
            to = {"to": int(ir.DataType.INT64)}
            same = editor.node("Cast", [value], to, wish=f"{value.name}.wide", dtype=ir.DataType.INT64)
            same.shape = value.shape
            for node, index in users:
                editor.rewire(node, index, same)
        editor.finish()
        return Changed(edits=editor.edits)
