"""Add an input for a causal mask of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class AddCausalMaskInput:
    """Add an input `causal_mask` to a model with a cache, which some runtimes require for chunked prefill.

    Before: `attention_mask [batch_size, total_sequence_length]` marks the tokens that count. After: in addition,
    `causal_mask [batch_size, 1, sequence_length, total_sequence_length]`, 1 if a query attends to a key, is as long as
    the attention mask, which for a static cache is its capacity. A token counts if the attention mask marks it and the
    last query attends to it. The graph still hides later keys from every query.

    Not handled: masks other than causal ones with padding, as only the last row is read; models without an integer
    mask.

    Attributes:
        input: Name of the input.
        mask: Name of the attention mask.
    """

    name: ClassVar[str] = "add-causal-mask-input"

    input: str = "causal_mask"
    mask: str = "attention_mask"

    def apply(self, subject: Subject) -> Outcome:
        """Add the input to `subject.model`."""
        graph, int64 = subject.model.graph, ir.DataType.INT64
        inputs = {value.name: value for value in graph.inputs}
        mask = inputs.get(self.mask)
        if self.input in inputs:
            return Unchanged(reason=f"the model has an input `{self.input}`")
        if mask is None or len(mask.shape or ()) != 2 or mask.dtype is None or not mask.dtype.is_integer():
            return Unchanged(reason=f"the model has no integer input `{self.mask}` of rank 2")
        uses = list(mask.uses())
        if not uses:
            return Unchanged(reason=f"nothing reads `{self.mask}`")
        editor = Editor(subject.model)
        editor.release_name(self.input)
        assert mask.shape is not None
        shape = ir.Shape((mask.shape[0], 1, "sequence_length", mask.shape[1]))
        causal = ir.Value(name=self.input, type=ir.TensorType(int64), shape=shape)
        graph.inputs.append(causal)
        last = editor.node("Gather", [causal, editor.constant(-1)], {"axis": 2}, name="last_query", dtype=int64)
        visible = editor.node("Squeeze", [last, editor.constant([1])], name="seen_by_last", dtype=int64)
        if mask.dtype != int64:
            visible = editor.node("Cast", [visible], {"to": mask.dtype}, name="seen_by_last", dtype=mask.dtype)
        counted = editor.node("Mul", [mask, visible], name="counted", dtype=mask.dtype, shape=mask.shape)
        for node, index in uses:
            editor.replace_input(node, index, counted)
        editor.finish()
        return Changed(edits=editor.edits)
