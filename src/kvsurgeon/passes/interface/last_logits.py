"""Compute the logits of the last real token only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.interface.lm_head import find_logits, select_tokens
from kvsurgeon.passes.interface.past_length_from_positions import POSITIONS


@dataclass(frozen=True, kw_only=True)
class LastLogits:
    """Compute the logits of one token only, the one with the highest of `position_ids`.

    Before: `logits [batch_size, sequence_length, vocabulary]`. After: `[batch_size, 1, vocabulary]`, and the LM head
    multiplies the features of one token.

    Not handled: batches above one; a model without `position_ids`.
    """

    name: ClassVar[str] = "last-logits"

    def apply(self, subject: Subject) -> Outcome:
        """Reduce the logits of `subject.model`.

        Raises:
            UnsupportedError: The model has no position_ids or no logits, or a batch above one.
        """
        graph = subject.model.graph
        logits = find_logits(graph)
        positions = next((value for value in graph.inputs if value.name == POSITIONS), None)
        if positions is None:
            raise UnsupportedError(
                f"the last token cannot be found without {POSITIONS}", code=Code.PASS_PRECONDITION,
                hint="run past-length-from-positions first",
            )  # fmt: skip
        if logits.shape is not None and logits.shape[1] == 1:
            return Unchanged(reason="the model returns the logits of one token")
        if positions.shape is None or positions.shape[0] != 1:
            raise UnsupportedError(
                "the sequences of a batch have different last tokens", code=Code.PASS_PRECONDITION, at=POSITIONS,
                expected="a batch of 1", found=str(positions.shape),
            )  # fmt: skip
        editor = Editor(subject.model)
        place = editor.node(
            "ArgMax", [positions], {"axis": 1, "keepdims": 0}, name="last_place", dtype=ir.DataType.INT64, shape=[1]
        )

        def last(hidden: ir.Value) -> ir.Value:
            return editor.node("Gather", [hidden, place], {"axis": 1}, name=f"{hidden.name}.last", dtype=hidden.dtype)

        select_tokens(editor, logits, last, 1)
        editor.finish()
        return Changed(edits=editor.edits)
