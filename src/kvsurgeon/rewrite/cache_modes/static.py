"""In place: the whole buffer in and out, with the new rows written at their places, so that both can be one memory."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.cache_entries import CacheTensor
from kvsurgeon.rewrite.cache_modes.mode import Joined
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.symbolic.dimension import MAX, NEW, PAST, TOTAL, Dimension

TENSOR_SCATTER = 24  # opset that brought it


@dataclass(frozen=True, kw_only=True)
class StaticCache:
    """`present = past`, with the rows `[P, P + S)` written.

    Context is computed for every row that the buffer has, as if tokens lay in all of them: rows that nothing was
    written to yet are then tokens of the future, which no query sees. That is what was proved of the model, so nothing
    has to be masked for it.

    Attributes:
        room: Rows of the buffer: a number, or a length that is read from it.
        cut_short: Whether attention reads the rows of the tokens so far only, which are copied for it.
    """

    room: Dimension = MAX
    cut_short: bool = False

    @property
    def past(self) -> Dimension:
        """The whole buffer."""
        return self.room

    @property
    def present(self) -> Dimension:
        """The whole buffer."""
        return self.room

    @property
    def total(self) -> Dimension:
        """All rows of the buffer, or those of the tokens so far."""
        return TOTAL if self.cut_short else self.room

    def join(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, past: ir.Value, rows: ir.Value) -> Joined:
        """Write the new rows into the buffer."""
        write = _scatter_tensor if editor.opset >= TENSOR_SCATTER else _scatter_elements
        present = write(editor, lengths, entry, past, rows)
        return Joined(present=present, whole=self.read(editor, lengths, entry, present))

    def read(self, editor: Editor, lengths: LengthValues, entry: CacheTensor, present: ir.Value) -> ir.Value:
        """All rows, or a copy of those so far."""
        present.shape = ir.Shape(entry.shape(self.room))
        if not self.cut_short:
            return present
        bounds = [lengths.vector([0]), lengths.vector([TOTAL]), editor.constant([entry.axis], name="axes")]
        return editor.node(
            "Slice", [present, *bounds], name=f"{entry.present}.so_far", dtype=entry.dtype, shape=entry.shape(TOTAL)
        )


def _scatter_tensor(
    editor: Editor, lengths: LengthValues, entry: CacheTensor, past: ir.Value, rows: ir.Value
) -> ir.Value:
    batch = entry.sizes(NEW)[entry.layout.index("batch")]
    start = lengths.repeated(PAST, batch)
    inputs = [past, rows, start]
    return editor.node("TensorScatter", inputs, {"axis": entry.axis - 4}, name=entry.present, dtype=entry.dtype)


def _scatter_elements(
    editor: Editor, lengths: LengthValues, entry: CacheTensor, past: ir.Value, rows: ir.Value
) -> ir.Value:
    places = lengths.places(PAST, entry.sizes(NEW), entry.axis)
    return editor.node(
        "ScatterElements", [past, places, rows], {"axis": entry.axis}, name=entry.present, dtype=entry.dtype
    )
