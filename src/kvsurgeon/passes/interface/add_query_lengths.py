"""Add an input for the number of new tokens of each sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.decompose.group_query_attention import QUERY_LENGTHS
from kvsurgeon.fusion.operators import GROUP_QUERY_ATTENTION
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_metadata import read_cache_metadata, write_cache_metadata


@dataclass(frozen=True, kw_only=True)
class AddQueryLengths:
    """Add an input `query_lengths` to a model whose sequences may differ in length, for calls on chunks of any lengths.

    Before: each sequence of a batch has its past length, and all have as many new tokens
    (`fuse-attention{padding=lengths}`, `--target genai-shared-buffer`). After: `query_lengths [batch_size]` int32 is
    the number of new tokens of each sequence, from 1 to `sequence_length`; those after them are padding, whose logits
    mean nothing, and which `attention_mask` does not count. The cache needs room for padding too: past tokens and
    `sequence_length` together are at most `max_length`. It is the input `query_seqlens` of `GroupQueryAttention`.

    Requires onnxruntime 1.32 or newer.

    Attributes:
        input: Name of the input.
    """

    name: ClassVar[str] = "add-query-lengths"

    input: str = "query_lengths"

    def apply(self, subject: Subject) -> Outcome:
        """Add the input to `subject.model`."""
        model = subject.model
        metadata = read_cache_metadata(model)
        if metadata is None or not metadata.ragged:
            return Unchanged(
                reason="all sequences of a batch have as many past tokens; see fuse-attention{padding=lengths}"
            )
        if metadata.batch_chunks:
            return Unchanged(reason="the sequences of a batch may already have any numbers of new tokens")
        editor = Editor(model)
        editor.release_name(self.input)
        batch = next(
            value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape) == 2
        )
        lengths = ir.Value(name=self.input, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([batch]))
        model.graph.inputs.append(lengths)
        for node in model.graph:
            if GROUP_QUERY_ATTENTION.is_at(node):
                node.resize_inputs(QUERY_LENGTHS + 1)
                editor.replace_input(node, QUERY_LENGTHS, lengths)
        editor.finish()
        write_cache_metadata(model, replace(metadata, batch_chunks=True))
        return Changed(edits=editor.edits)
