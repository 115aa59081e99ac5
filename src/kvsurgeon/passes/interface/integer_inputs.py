"""Take whole numbers as clients want them: of 32 bits, or of 64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged

_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True, kw_only=True)
class Int32Inputs:
    """Give every input of 64-bit integers as one of 32 bits.

    Before: `input_ids` of int64. After: of int32, made wider in the graph.

    Not handled: numbers that 32 bits do not hold.
    """

    name: ClassVar[str] = "int32-inputs"

    def apply(self, subject: Subject) -> Outcome:
        """Narrow the inputs of `subject.model`."""
        return _given_as(_INT32, _INT64, subject, "wide")


@dataclass(frozen=True, kw_only=True)
class Int64Inputs:
    """Give every input of 32-bit integers as one of 64 bits, as most clients give ids.

    Before: `input_ids` of int32. After: of int64, made narrower in the graph.

    Not handled: numbers that 32 bits do not hold.
    """

    name: ClassVar[str] = "int64-inputs"

    def apply(self, subject: Subject) -> Outcome:
        """Widen the inputs of `subject.model`."""
        return _given_as(_INT64, _INT32, subject, "narrow")


def _given_as(given: ir.DataType, read: ir.DataType, subject: Subject, name: str) -> Outcome:
    """Let every input that is of the type `read` be given as the other, and cast it back where it is read."""
    others = [value for value in subject.model.graph.inputs if value.dtype is read]
    if not others:
        return Unchanged(reason=f"no input holds integers of {read.itemsize * 8:g} bits")
    editor = Editor(subject.model)
    for value in others:
        users = tuple(value.uses())
        value.dtype = given
        same = editor.node("Cast", [value], {"to": int(read)}, name=f"{value.name}.{name}", dtype=read)
        same.shape = value.shape
        for node, index in users:
            editor.replace_input(node, index, same)
    editor.finish()
    return Changed(edits=editor.edits)
