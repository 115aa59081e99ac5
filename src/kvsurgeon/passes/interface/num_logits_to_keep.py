"""Add an input by which the caller says of how many tokens it wants logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.interface.lm_head import find_logits, select_tokens

_TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class NumLogitsToKeep:
    """Add an input for the number of tokens, counted from the last of a call, of which logits are computed.

    Before: `logits [batch_size, sequence_length, vocabulary]`. After: `[batch_size, num_logits, vocabulary]`, and the
    LM head multiplies the features of these tokens. 0 computes the logits of all, as do numbers above the length of
    the call; transformers.js feeds such an input, 1 in generation.

    Not handled: logits of one token.

    Attributes:
        input: Name of the new input, an int64 scalar.
    """

    name: ClassVar[str] = "num-logits-to-keep"

    input: str = "num_logits_to_keep"

    def apply(self, subject: Subject) -> Outcome:
        """Add the input to `subject.model`.

        Raises:
            UnsupportedError: The model has no logits of several tokens.
        """
        graph = subject.model.graph
        if any(value.name == self.input for value in graph.inputs):
            return Unchanged(reason=f"the model has an input `{self.input}`")
        logits = find_logits(graph)
        if logits.shape is not None and logits.shape[1] == 1:
            raise UnsupportedError(
                "the model returns the logits of one token", code=Code.PASS_PRECONDITION, at=logits.name,
                expected="[batch, sequence, vocabulary]", found=str(logits.shape),
                hint="run the pass before last-logits, or omit it",
            )  # fmt: skip
        editor = Editor(subject.model)
        count = ir.Value(name=editor.unique_name(self.input), shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(count)
        negative = editor.node("Neg", [count], name=f"{self.input}.from_end", dtype=ir.DataType.INT64, shape=[])
        start = editor.node(  # 0 is its own negative: all tokens
            "Reshape", [negative, editor.constant([1])], name=f"{self.input}.start", dtype=ir.DataType.INT64, shape=[1]
        )  # fmt: skip
        end, axis = editor.constant([_TO_THE_END]), editor.constant([1])

        def kept(hidden: ir.Value) -> ir.Value:
            return editor.node("Slice", [hidden, start, end, axis], name=f"{hidden.name}.kept", dtype=hidden.dtype)

        select_tokens(editor, logits, kept, "num_logits")
        editor.finish()
        return Changed(edits=editor.edits)
