"""Write a model in a later version of ONNX's operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.opset.versions import (
    NEWEST,
    OTHERWISE,
    check_movable,
    declared_opset,
    ir_version,
    standard_nodes,
)
from kvsurgeon.passes.options import check_count


@dataclass(frozen=True, kw_only=True)
class RaiseOpset:
    """Declare a later opset, so that operators which it brought can be used.

    Before: nodes as an exporter wrote them. After: the same nodes, of the later versions of their operators. What an
    operator once had as an attribute and has as an input now is moved there.

    Not handled: operators that are gone, or mean something else; models that call functions of their own.

    Attributes:
        opset: The version to declare.
    """

    name: ClassVar[str] = "raise-opset"

    opset: int = 24

    def __post_init__(self) -> None:
        check_count("opset", self.opset, most=NEWEST)

    def apply(self, subject: Subject) -> Outcome:
        """Raise the opset of `subject.model`.

        Raises:
            UnsupportedError: A node cannot be written in that version.
        """
        model = subject.model
        declared = declared_opset(model)
        if declared >= self.opset:
            return Unchanged(reason=f"it is written in opset {declared}")
        check_movable(model, declared, "raised")
        moves = {node: _moved(node, declared, self.opset) for node in standard_nodes(model)}
        editor = Editor(model)
        for node, names in moves.items():
            for name in names:
                _move(editor, node, name, self.opset)
            if node.op_type in _FURTHER:
                _FURTHER[node.op_type](node)
        model.graph.opset_imports[""] = self.opset
        model.ir_version = max(model.ir_version, ir_version(self.opset))
        return Changed(edits=editor.edits + 1)


def _moved(node: ir.Node, old: int, new: int) -> list[str]:
    """The attributes that have become inputs.

    Raises:
        UnsupportedError: The later version of the operator cannot say what the node says.
    """
    try:
        before, after = onnx.defs.get_schema(node.op_type, old, ""), onnx.defs.get_schema(node.op_type, new, "")
    except onnx.defs.SchemaError:
        return []  # an operator of a runtime's own, written without its domain
    if before.since_version == after.since_version:
        return []
    inputs = [given.name for given in after.inputs]
    gone = [name for name in node.attributes if name not in after.attributes]
    kept = [given.name for given in before.inputs] == inputs[: len(before.inputs)]
    if node.op_type in OTHERWISE or after.deprecated or not kept or not set(gone) <= set(inputs):
        raise UnsupportedError(
            f"{node.op_type} of opset {old} cannot be written in opset {new}", at=node.outputs[0].name,
            hint="export the model with a later opset",
        )  # fmt: skip
    return gone


def _move(editor: Editor, node: ir.Node, name: str, opset: int) -> None:
    place = [given.name for given in onnx.defs.get_schema(node.op_type, opset, "").inputs].index(name)
    numbers = np.array(node.attributes[name].value)
    value = editor.constant(numbers, numbers.dtype, name=name)
    if len(node.inputs) <= place:
        node.resize_inputs(place + 1)
    editor.replace_input(node, place, value)
    editor.remove_attribute(node, name)


def _count_parts(node: ir.Node) -> None:
    """A `Split` without sizes says since opset 18 how many parts it makes."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.setdefault("num_outputs", ir.AttrInt64("num_outputs", len(node.outputs)))


_FURTHER: dict[str, Callable[[ir.Node], None]] = {"Split": _count_parts}
