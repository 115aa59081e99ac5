"""Let one operator turn queries and keys by their positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import shapes_of
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.rotary import Turn, find_turn
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged

SINCE = 23  # opset that brought the operator


@dataclass(frozen=True, kw_only=True)
class FuseRotary:
    """Let one operator turn queries and keys by their positions, in place of the six that exporters write.

    Before: `x * cosines + Concat(-x[half:], x[:half]) * sines`. After: `RotaryEmbedding` of opset 23, which reads one
    half of each table: that both halves are alike is read off the `Concat` that they come from.

    Not handled: neighbours that are turned as pairs, tables whose halves are not made by one `Concat`.
    """

    name: ClassVar[str] = "fuse-rotary"

    def apply(self, subject: Subject) -> Outcome:
        """Fuse the turns of `subject.model`.

        Raises:
            UnsupportedError: The model's opset lacks the operator.
        """
        graph = subject.model.graph
        with deep_recursion():
            shapes = shapes_of(graph)
            turns = [turn for node in graph if (turn := find_turn(shapes, node)) is not None]
        if not turns:
            return Unchanged(reason="nothing is turned by halves with tables made of one")
        opset = graph.opset_imports.get("", 1)
        if opset < SINCE:
            raise UnsupportedError(
                "RotaryEmbedding is not in the model's opset", at=turns[0].result.name, expected=f"opset {SINCE}",
                found=str(opset), hint="raise-opset first",
            )  # fmt: skip
        editor = Editor(subject.model)
        tables = _Tables(editor, shapes)
        for turn in turns:
            _write(turn, editor, tables)
        editor.finish()
        return Changed(edits=editor.edits)


def _write(turn: Turn, editor: Editor, tables: _Tables) -> None:
    """Put the operator in the place of a turn: before heads are laid apart where they come from rows of features."""
    rows = turn.rows
    x = turn.x if rows is None else rows
    inputs = [x, *(tables.half(table, turn) for table in (turn.cosines, turn.sines))]
    old = turn.result
    new = ir.Value(name=editor.unique_name(f"{old.name}.turned"), type=old.type or turn.x.type, shape=x.shape)
    attributes = {} if rows is None else {"num_heads": turn.heads}
    editor.operator("", "RotaryEmbedding", inputs, attributes, [new], like=old.producer())
    if rows is not None:
        target = editor.constant([0, 0, turn.heads, turn.width], name="heads_apart")
        apart = editor.node("Reshape", [new, target], name=f"{old.name}.apart", dtype=new.dtype)
        new = editor.node("Transpose", [apart], {"perm": [0, 2, 1, 3]}, name=f"{old.name}.turned", dtype=new.dtype)
    editor.replace(old, new)


class _Tables:
    """Halves of tables, as [batch, sequence, width / 2]; each made once."""

    def __init__(self, editor: Editor, shapes: Shapes) -> None:
        self.editor = editor
        self.shapes = shapes
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def half(self, table: ir.Value, turn: Turn) -> ir.Value:
        """The first half of a table, for as many sequences as are turned."""
        mine, theirs = ((self.shapes[one].shape or (None,))[0] for one in (table, turn.x))
        batch = None if mine == theirs else theirs
        key = table, turn.width, batch
        if key not in self._made:
            half = self._half(table, turn)
            self._made[key] = half if batch is None else self._for_batch(half, turn.x)
        return self._made[key]

    def _half(self, table: ir.Value, turn: Turn) -> ir.Value:
        bounds = [self.editor.constant([number], name="half") for number in (0, turn.width // 2, 3)]
        half = self.editor.node("Slice", [table, *bounds], name=f"{table.name}.half", dtype=turn.x.dtype)
        heads = self.editor.constant([1], name="heads_axis")
        return self.editor.node("Squeeze", [half, heads], name=f"{table.name}.rows", dtype=turn.x.dtype)

    def _for_batch(self, half: ir.Value, x: ir.Value) -> ir.Value:
        batch = self.editor.node("Shape", [x], {"start": 0, "end": 1}, name="batch", dtype=ir.DataType.INT64)
        ones = self.editor.constant([1, 1], name="ones")
        target = self.editor.node("Concat", [batch, ones], {"axis": 0}, name="shape", dtype=ir.DataType.INT64)
        return self.editor.node("Expand", [half, target], name=f"{half.name}.batch", dtype=x.dtype)
