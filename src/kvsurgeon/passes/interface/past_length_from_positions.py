"""Read the past length from the positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.rewrite.cache_plan import PAST_LENGTH, first_position

POSITIONS = "position_ids"


@dataclass(frozen=True, kw_only=True)
class PastLengthFromPositions:
    """Read the number of past tokens from the first element of `position_ids`, an input that is added if missing.

    Before: a static cache with an input `past_sequence_length`. After: `position_ids [batch_size, sequence_length]`
    replaces it. Positions after the last real token may have any value, such as -1.

    Not handled: a past length for each sequence, as the first sequence of a batch determines it for all.
    """

    name: ClassVar[str] = "past-length-from-positions"

    def apply(self, subject: Subject) -> Outcome:
        """Replace the input of `subject.model`.

        Raises:
            UnsupportedError: No input contains the new tokens, or each sequence has its own past length.
        """
        graph, int64 = subject.model.graph, ir.DataType.INT64
        inputs = {value.name: value for value in graph.inputs}
        past_length = inputs.get(PAST_LENGTH)
        if past_length is None:
            return Unchanged(reason=f"the model has no input {PAST_LENGTH}")
        if past_length.shape is not None and past_length.shape[0] != 1:
            raise UnsupportedError(
                "each sequence of a batch has its own past length", code=Code.PASS_PRECONDITION, at=PAST_LENGTH,
                expected="one number for all", found=str(past_length.shape),
            )  # fmt: skip
        editor = Editor(subject.model)
        positions = inputs.get(POSITIONS) or _add_positions(editor)
        first = first_position(editor, positions, name="positions")
        if positions.dtype is not int64:
            first = editor.node("Cast", [first], {"to": int(int64)}, name="past_length", dtype=int64, shape=[1])
        past_length.replace_all_uses_with(first)
        graph.inputs.remove(past_length)
        editor.finish()
        return Changed(edits=editor.edits)


def _add_positions(editor: Editor) -> ir.Value:
    """Add an input of positions after the input of new tokens."""
    inputs = editor.graph.inputs
    for index, value in enumerate(inputs):
        if value.shape is not None and len(value.shape) >= 2:
            editor.release_name(POSITIONS)
            positions = ir.Value(
                name=POSITIONS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(value.shape[:2])
            )  # fmt: skip
            inputs.insert(index + 1, positions)
            return positions
    raise UnsupportedError(
        "no input contains the new tokens", code=Code.PASS_PRECONDITION,
        expected="an input such as input_ids [batch, sequence]",
    )  # fmt: skip
