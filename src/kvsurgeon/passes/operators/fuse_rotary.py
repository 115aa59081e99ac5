"""Replace rotary embeddings by one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import shapes_of
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.fusion.rotary import RotaryMatch, match_rotary
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.recursion import deep_recursion
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged

SINCE = 23  # opset of RotaryEmbedding

Tables = dict[tuple[object, ...], ir.Value]


@dataclass(frozen=True, kw_only=True)
class FuseRotary:
    """Replace the six operators of a rotary embedding by `RotaryEmbedding`.

    Before: `x * cos + Concat(-x[half:], x[:half]) * sin`. After: `RotaryEmbedding` of opset 23 with one half of each
    table. Both halves of a table must come from one `Concat(half, half)`.

    Not handled: interleaved rotary embeddings, tables whose halves come from different operators.
    """

    name: ClassVar[str] = "fuse-rotary"

    def apply(self, subject: Subject) -> Outcome:
        """Fuse the rotary embeddings of `subject.model`.

        Raises:
            UnsupportedError: The opset of the model lacks the operator.
        """
        graph = subject.model.graph
        with deep_recursion():
            shapes = shapes_of(graph)
            matches = [match for node in graph if (match := match_rotary(shapes, node)) is not None]
        if not matches:
            return Unchanged(reason="no rotary embedding with equal halves in its tables")
        opset = graph.opset_imports.get("", 1)
        if opset < SINCE:
            raise UnsupportedError(
                "RotaryEmbedding is not in the model's opset", code=Code.OPSET, at=matches[0].result.name,
                expected=f"opset {SINCE}", found=f"opset {opset}", hint="run raise-opset first",
            )  # fmt: skip
        editor = Editor(subject.model)
        tables: Tables = {}
        for match in matches:
            editor.replace(match.result, _rotary_embedding(editor, match, shapes, tables))
        editor.finish()
        return Changed(edits=editor.edits)


def _rotary_embedding(editor: Editor, match: RotaryMatch, shapes: Shapes, tables: Tables) -> ir.Value:
    """Add the operator and return its result as [batch, heads, sequence, head_dim].

    It reads [batch, sequence, heads * head_dim] if that is what x is a view of.
    """
    result = match.result
    x = match.x if match.hidden is None else match.hidden
    inputs = [x, *(_half_table(editor, table, match, shapes, tables) for table in (match.cos, match.sin))]
    name, dtype = f"{result.name}.turned", result.dtype or match.x.dtype
    attributes = {} if match.hidden is None else {"num_heads": match.heads}
    rotated = editor.node(
        "RotaryEmbedding", inputs, attributes, name=name, dtype=dtype, shape=x.shape, like=result.producer()
    )
    if match.hidden is None:
        return rotated
    target = editor.constant([0, 0, match.heads, match.head_dim], name="heads_apart")
    by_heads = editor.node("Reshape", [rotated, target], name=f"{result.name}.apart", dtype=dtype)
    return editor.node("Transpose", [by_heads], {"perm": [0, 2, 1, 3]}, name=name, dtype=dtype)


def _half_table(editor: Editor, table: ir.Value, match: RotaryMatch, shapes: Shapes, tables: Tables) -> ir.Value:
    """Return the first half of a table, [batch, sequence, head_dim / 2]; equal ones are shared."""
    batch, batch_of_x = ((shapes[one].shape or (None,))[0] for one in (table, match.x))
    expands = batch != batch_of_x
    key = table, match.head_dim, batch_of_x if expands else None
    if key in tables:
        return tables[key]
    dtype = match.x.dtype
    bounds = [editor.constant([number], name="half") for number in (0, match.head_dim // 2, 3)]
    half = editor.node("Slice", [table, *bounds], name=f"{table.name}.half", dtype=dtype)
    half = editor.node(
        "Squeeze", [half, editor.constant([1], name="heads_axis")], name=f"{table.name}.rows", dtype=dtype
    )
    if expands:
        int64 = ir.DataType.INT64
        size = editor.node("Shape", [match.x], {"start": 0, "end": 1}, name="batch", dtype=int64)
        ones = editor.constant([1, 1], name="ones")
        target = editor.node("Concat", [size, ones], {"axis": 0}, name="shape", dtype=int64)
        half = editor.node("Expand", [half, target], name=f"{half.name}.batch", dtype=dtype)
    return tables.setdefault(key, half)
