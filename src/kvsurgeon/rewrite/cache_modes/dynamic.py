"""DynamicCache: the past in, past and new rows out, and the present is the next call's past."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.cache_entries import CacheTensor
from kvsurgeon.rewrite.cache_modes.mode import Joined
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic.dimension import PAST, TOTAL, Dimension


@dataclass(frozen=True, kw_only=True)
class DynamicCache:
    """`present = Concat(past, new rows)`."""

    past: Dimension = PAST
    present: Dimension = TOTAL
    total: Dimension = TOTAL

    def join(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, past: ir.Value, rows: ir.Value) -> Joined:
        """Put the new rows behind the past."""
        present = editor.node(
            "Concat", [past, rows], {"axis": entry.axis},
            name=entry.present, dtype=entry.dtype, shape=entry.shape(self.present),
        )  # fmt: skip
        return Joined(present=present, whole=present)

    def read(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, present: ir.Value) -> ir.Value:
        """The present itself."""
        present.shape = ir.Shape(entry.shape(self.present))
        return present
