"""Add an input for the row of the cache that each sequence of a call has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.cache.pairs import CachePair, find_cache_pairs
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor, check_free
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_metadata import read_cache_metadata

BATCH_INDEX, ROWS = "batch_index", "full_batch_size"


@dataclass(frozen=True, kw_only=True)
class AddBatchIndex:
    """Add an input `batch_index` that says which row of the static cache each sequence of a call reads and writes.

    Before: sequence `b` of a call has row `b` of every buffer `[batch_size, ...]`, and its own past length
    (`inject --cache static --past-length per-sequence`, `fuse-attention{padding=lengths}`). After: it has row
    `batch_index[b, 0]` of buffers `[full_batch_size, ...]`; other rows are returned unchanged. `batch_index
    [batch_size, 1]` is int64, from 0 to `full_batch_size - 1`, and no two sequences of a call have the same row.

    Source: the continuous batching of QEfficient, for Qualcomm Cloud AI 100. This pass comes last: a cache whose rows
    are chosen by an input is not found by other passes.

    Not handled: caches whose first axis is not the batch, states of fixed size.
    """

    name: ClassVar[str] = "add-batch-index"

    def apply(self, subject: Subject) -> Outcome:
        """Add the input to `subject.model`.

        Raises:
            UnsupportedError: A buffer has another first axis than the batch, or an input has that name; the model is
                unchanged.
        """
        graph, metadata = subject.model.graph, read_cache_metadata(subject.model)
        if metadata is None or not metadata.ragged:
            return Unchanged(
                reason="all sequences of a batch have as many past tokens; see inject --past-length per-sequence"
            )
        if any(value.name == BATCH_INDEX for value in graph.inputs):
            return Unchanged(reason=f"the model has an input {BATCH_INDEX}")
        check_free(graph, [BATCH_INDEX])
        pairs = find_cache_pairs(graph)
        batch = next(value.shape[0] for value in graph.inputs if value.shape is not None and len(value.shape) == 2)
        for pair in pairs:
            _check_batch_first(pair, batch)
        editor = Editor(subject.model)
        editor.release_name(BATCH_INDEX)
        index = ir.Value(name=BATCH_INDEX, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch, 1]))
        graph.inputs.append(index)
        for pair in pairs:
            _select_rows(editor, pair, index)
        editor.finish()
        return Changed(edits=editor.edits)


def _check_batch_first(pair: CachePair, batch: int | ir.SymbolicDim) -> None:
    """Check that a sequence has one row of a buffer.

    Raises:
        UnsupportedError: It has not.
    """
    shape = pair.past.shape
    if not pair.is_buffer or shape is None or shape[0] != batch:
        raise UnsupportedError(
            "a cached tensor has no row for each sequence", code=Code.PASS_PRECONDITION, at=pair.past.name,
            expected=f"a buffer [{batch}, ...]", found=str(shape),
        )  # fmt: skip


def _select_rows(editor: Editor, pair: CachePair, index: ir.Value) -> None:
    """Update the rows of the sequences of a call alone."""
    past, present = pair.past, pair.present
    assert past.shape is not None
    all_rows, users = ir.Shape([ROWS, *past.shape[1:]]), tuple(past.uses())
    rows = editor.node("GatherND", [past, index], name=f"{past.name}.rows", dtype=past.dtype, shape=past.shape)
    for user, place in users:
        editor.replace_input(user, place, rows)
    whole = editor.node(
        "ScatterND", [past, index, present], name=f"{present.name}.rows", dtype=past.dtype, shape=all_rows
    )
    past.shape = all_rows
    editor.replace_output(present, whole)
