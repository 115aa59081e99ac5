"""Take a mask of queries against keys beside the mask of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged

_INT64 = ir.DataType.INT64
_WHOLE = {dtype for dtype in ir.DataType if dtype.is_integer()}


@dataclass(frozen=True, kw_only=True)
class AddCausalMaskInput:
    """Give a model with a cache an input `causal_mask`: some hosts fill in prompts in chunks only where there is one.

    Before: `attention_mask [batch_size, total_sequence_length]` says which tokens count. After: `causal_mask
    [batch_size, 1, sequence_length, total_sequence_length]` is given too, 1 where a query sees a key; it is as long as
    the attention mask is, be that the rows of a buffer. A token counts if the attention mask says so and the last query
    sees it. That no query sees a later key stays what the graph computes.

    Not handled: masks that are more than causal behind padding, as the last row alone is read; models without a mask of
    whole numbers.

    Attributes:
        input: Name of the input.
        mask: Name of the mask of tokens.
    """

    name: ClassVar[str] = "add-causal-mask-input"

    input: str = "causal_mask"
    mask: str = "attention_mask"

    def apply(self, subject: Subject) -> Outcome:
        """Give `subject.model` the input."""
        graph = subject.model.graph
        inputs = {value.name: value for value in graph.inputs}
        mask = inputs.get(self.mask)
        if self.input in inputs:
            return Unchanged(reason=f"it has an input `{self.input}`")
        if mask is None or mask.shape is None or len(mask.shape) != 2 or mask.dtype not in _WHOLE:
            return Unchanged(reason=f"it has no input `{self.mask}` of whole numbers for each token")
        readers = list(mask.uses())
        if not readers:
            return Unchanged(reason=f"nothing reads `{self.mask}`")
        editor = Editor(subject.model)
        editor.release_name(self.input)
        dims = mask.shape[0], 1, "sequence_length", mask.shape[1]
        given = ir.Value(name=self.input, type=ir.TensorType(_INT64), shape=ir.Shape(dims))
        graph.inputs.append(given)
        last = editor.node("Gather", [given, editor.constant(-1)], {"axis": 2}, name="last_query", dtype=_INT64)
        seen = editor.node("Squeeze", [last, editor.constant([1])], name="seen_by_last", dtype=_INT64)
        if mask.dtype != _INT64:
            seen = editor.node("Cast", [seen], {"to": mask.dtype}, name="seen_by_last", dtype=mask.dtype)
        counted = editor.node("Mul", [mask, seen], name="counted", dtype=mask.dtype)
        counted.shape = mask.shape
        for node, place in readers:
            editor.replace_input(node, place, counted)
        editor.finish()
        return Changed(edits=editor.edits)
