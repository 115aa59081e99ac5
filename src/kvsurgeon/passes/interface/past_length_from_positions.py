"""Let positions say how many tokens a cache holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_plan import PAST_LENGTH

POSITIONS = "position_ids"


@dataclass(frozen=True, kw_only=True)
class PastLengthFromPositions:
    """Read the number of past tokens from the first of `position_ids`, which the model is given if it is not yet.

    Before: a cache written in place, with an input `past_sequence_length`. After: `position_ids [batch_size,
    sequence_length]` in its stead. Positions behind the last real token may be anything, such as -1.

    Not handled: rows of a batch that have tokens in different places; the first row speaks for all.
    """

    name: ClassVar[str] = "past-length-from-positions"

    def apply(self, subject: Subject) -> Outcome:
        """Replace the input of `subject.model`.

        Raises:
            UnsupportedError: No input holds the new tokens.
        """
        graph = subject.model.graph
        inputs = {value.name: value for value in graph.inputs}
        counter = inputs.get(PAST_LENGTH)
        if counter is None:
            return Unchanged(reason=f"it has no input {PAST_LENGTH}")
        editor = Editor(subject.model)
        positions = inputs.get(POSITIONS) or self._given(editor)
        flat = editor.node("Reshape", [positions, editor.constant([-1])], name="positions", dtype=positions.dtype)
        first = editor.node(
            "Gather", [flat, editor.constant([0])], name="position.first", dtype=positions.dtype, shape=[1]
        )
        if positions.dtype is not ir.DataType.INT64:
            to = {"to": int(ir.DataType.INT64)}
            first = editor.node("Cast", [first], to, name="past_length", dtype=ir.DataType.INT64, shape=[1])
        counter.replace_all_uses_with(first)
        graph.inputs.remove(counter)
        editor.finish()
        return Changed(edits=editor.edits)

    def _given(self, editor: Editor) -> ir.Value:
        """A new input of positions, one for each new token, behind the tokens themselves."""
        inputs = editor.graph.inputs
        for place, value in enumerate(inputs):
            if len(value.shape or ()) >= 2 and value.shape is not None:
                editor.release_name(POSITIONS)
                positions = ir.Value(
                    name=POSITIONS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(value.shape[:2])
                )
                inputs.insert(place + 1, positions)
                return positions
        raise UnsupportedError("no input holds the new tokens", expected="an input such as input_ids [batch, sequence]")
