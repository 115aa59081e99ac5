"""Grow: the past in, past and new rows out, and the present is the next call's past."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.idioms.entries import Entry
from kvsurgeon.passes.idioms.idiom import Joined
from kvsurgeon.sequence.lengths import PAST, SO_FAR, Lengths
from kvsurgeon.shapes.dimension import Dimension


@dataclass(frozen=True, kw_only=True)
class Grow:
    """`present = Concat(past, new rows)`."""

    past: Dimension = PAST
    present: Dimension = SO_FAR
    total: Dimension = SO_FAR

    def join(self, editor: Editor, lengths: Lengths, entry: Entry, past: ir.Value, rows: ir.Value) -> Joined:
        """Put the new rows behind the past."""
        present = editor.node(
            "Concat", [past, rows], {"axis": entry.axis},
            wish=entry.present, dtype=entry.dtype, shape=entry.shape(self.present),
        )  # fmt: skip
        return Joined(present=present, whole=present)

    def read(self, editor: Editor, lengths: Lengths, entry: Entry, present: ir.Value) -> ir.Value:
        """The present itself."""
        present.shape = ir.Shape(entry.shape(self.present))
        return present
