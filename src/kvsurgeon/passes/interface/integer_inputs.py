"""Change the type of integer inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged

_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64


@dataclass(frozen=True, kw_only=True)
class Int32Inputs:
    """Change int64 inputs to int32.

    Before: `input_ids` of int64. After: `input_ids` of int32, and a `Cast` to int64 in the graph.

    Not handled: values that int32 cannot represent.
    """

    name: ClassVar[str] = "int32-inputs"

    def apply(self, subject: Subject) -> Outcome:
        """Change the int64 inputs of `subject.model`."""
        return _change_inputs(subject, _INT64, _INT32, "wide")


@dataclass(frozen=True, kw_only=True)
class Int64Inputs:
    """Change int32 inputs to int64, the type of ids in most clients.

    Before: `input_ids` of int32. After: `input_ids` of int64, and a `Cast` to int32 in the graph.

    Not handled: values that int32 cannot represent.
    """

    name: ClassVar[str] = "int64-inputs"

    def apply(self, subject: Subject) -> Outcome:
        """Change the int32 inputs of `subject.model`."""
        return _change_inputs(subject, _INT32, _INT64, "narrow")


def _change_inputs(subject: Subject, old: ir.DataType, new: ir.DataType, suffix: str) -> Outcome:
    """Change the type of inputs and cast them back for the nodes that read them."""
    values = [value for value in subject.model.graph.inputs if value.dtype is old]
    if not values:
        return Unchanged(reason=f"no input is {old.name.lower()}")
    editor = Editor(subject.model)
    for value in values:
        users = tuple(value.uses())
        value.type = ir.TensorType(new)  # copies of the graph share the type
        cast = editor.node(
            "Cast", [value], {"to": int(old)}, name=f"{value.name}.{suffix}", dtype=old, shape=value.shape
        )
        for node, index in users:
            editor.replace_input(node, index, cast)
    editor.finish()
    return Changed(edits=editor.edits)
