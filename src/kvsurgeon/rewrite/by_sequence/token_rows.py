"""A past length for each sequence of a batch: what depends on the row of a new token is gathered at that row.

The new tokens of a sequence b are the rows `past_sequence_length[b] + [0, sequence_length)` of its text and of its
buffer. Masks, biases, positions and angles have a row for each token, so they are gathered at these rows, and the new
keys and values are written there. A row of the buffer that a sequence has not filled is a future token of it, which
causality hides. No other number of past tokens is left in the graph: what needs one for the whole batch is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis, analyze
from kvsurgeon.cache.layout import Layout
from kvsurgeon.dataflow.input_dimensions import GIVEN_FOR
from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.decompose import decompose_attention
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor, NodeBuilder
from kvsurgeon.resizing.lengths import INT64, LengthValues
from kvsurgeon.rewrite.by_sequence.given_positions import (
    GivenPositions,
    context_of_new_tokens,
    shape_of_tokens,
)
from kvsurgeon.symbolic.dimension import BATCH, NEW, Dimension

ROWS = "kvsurgeon.rows"  # name of the input, int64 [batch, sequence], until past lengths replace it


def with_token_rows(analysis: Analysis) -> Analysis:
    """Return the analysis of the model with an input for the row of each new token; the model is edited.

    Raises:
        UnsupportedError: Something that depends on the row of a token cannot be gathered.
    """
    if analysis.flow.batch != BATCH:
        raise UnsupportedError(
            "sequences can have separate past lengths only in a batch of any size", code=Code.PASS_PRECONDITION,
            at=analysis.inputs[0].value.name, expected="a symbolic batch size", found=str(analysis.flow.batch),
        )  # fmt: skip
    if any(site.fused is not None for site in analysis.sites):  # its mask is not one for all sequences
        decompose_attention(analysis.model)
        analysis = analyze(analysis.model)
    graph, editor = analysis.model.graph, Editor(analysis.model)
    rows = ir.Value(name=ROWS, type=ir.TensorType(INT64), shape=shape_of_tokens(analysis))
    rows.metadata_props[GIVEN_FOR] = "new"
    given = GivenPositions(analysis, editor, rows)
    for node, index, axis in context_of_new_tokens(analysis, masks=True):
        editor.replace_input(node, index, given.at_tokens(node, index, axis))
    graph.inputs.append(rows)
    editor.finish()
    return analyze(analysis.model)


def find_token_rows(inputs: Sequence[InputRole]) -> ir.Value | None:
    """Return the input for the row of each new token, if there is one."""
    return next((given.value for given in inputs if given.value.name == ROWS), None)


def rows_of_buffer(lengths: LengthValues, layout: Layout, sizes: Sequence[Dimension], rows: ir.Value) -> ir.Value:
    """Return the row of the buffer that each new element is written to, as int64 of the shape of the new rows."""
    op = NodeBuilder(lengths.editor, "rows")

    def make() -> ir.Value:
        batch, sequence = layout.index("batch"), layout.index("sequence")
        ordered = rows if batch < sequence else op.Transpose(rows, perm=[1, 0])
        others = [axis for axis in range(len(layout)) if axis not in (batch, sequence)]
        places = op.with_axes("Unsqueeze", ordered, others)
        return op.Expand(places, lengths.vector(sizes))

    return lengths.once(("rows of the buffer", layout, tuple(sizes)), make)


def first_rows(lengths: LengthValues, rows: ir.Value) -> ir.Value:
    """Return the row of the first new token of each sequence, int64 `[batch]`."""
    editor = lengths.editor
    inputs, along = [rows, editor.constant(np.int64(0), name="first")], {"axis": 1}
    return lengths.once("first rows", lambda: editor.node("Gather", inputs, along, name="rows.first", dtype=INT64))


def replace_token_rows(lengths: LengthValues, rows: ir.Value, past: ir.Value) -> None:
    """Replace the input for the row of each new token by what follows the past length of its sequence, `[batch]`."""
    op = NodeBuilder(lengths.editor, "rows")
    counted = op.Range(lengths.scalar(0), lengths.scalar(NEW), lengths.scalar(1))
    computed = op.Add(op.with_axes("Unsqueeze", past, [1]), counted)
    computed.type, computed.shape = rows.type, rows.shape
    rows.replace_all_uses_with(computed)
    lengths.editor.graph.inputs.remove(rows)
