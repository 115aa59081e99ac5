"""Convert a model to a later opset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged
from kvsurgeon.passes.opset import versions
from kvsurgeon.passes.options import check_count


@dataclass(frozen=True, kw_only=True)
class RaiseOpset:
    """Convert a model to a later opset, so that its operators can be used.

    Before: nodes of the exported opset. After: the same nodes in the later version of their operators. Attributes that
    became inputs are converted to constants.

    Not handled: operators that were removed or changed their meaning, models with functions.

    Attributes:
        opset: Opset version to convert to.
    """

    name: ClassVar[str] = "raise-opset"

    opset: int = 24

    def __post_init__(self) -> None:
        check_count("opset", self.opset, most=versions.NEWEST)

    def apply(self, subject: Subject) -> Outcome:
        """Raise the opset of `subject.model`.

        Raises:
            UnsupportedError: A node has no equivalent in the later opset; the model is unchanged.
        """
        model = subject.model
        declared = versions.declared_opset(model)
        if declared >= self.opset:
            return Unchanged(reason=f"the model has opset {declared}")
        versions.check_convertible(model, declared, "raised")
        moved = {node: _moved_attributes(node, declared, self.opset) for node in versions.standard_nodes(model)}
        editor = Editor(model)
        for node, places in moved.items():
            for name, place in places.items():
                _move(editor, node, name, place)
            if node.op_type == "Split":
                _set_num_outputs(node)
        model.graph.opset_imports[""] = self.opset
        model.ir_version = max(model.ir_version, versions.ir_version(self.opset))
        return Changed(edits=editor.edits + 1)


def _moved_attributes(node: ir.Node, old: int, new: int) -> dict[str, int]:
    """Return the attributes of a node that became inputs, with the index of the input.

    Raises:
        UnsupportedError: The node has no equivalent in the later opset.
    """
    before, after = versions.schema(node, old), versions.schema(node, new)
    if before is None or after is None:
        return {}  # an operator of onnxruntime without a domain
    if before.since_version == after.since_version:
        return {}
    inputs = [formal.name for formal in after.inputs]
    removed = [name for name in node.attributes if name not in after.attributes]
    same_inputs = [formal.name for formal in before.inputs] == inputs[: len(before.inputs)]
    if versions.is_redefined(node) or after.deprecated or not same_inputs or not set(removed) <= set(inputs):
        raise UnsupportedError(
            f"{node.op_type} of opset {old} has no equivalent in opset {new}", code=Code.OPSET,
            at=node.outputs[0].name, hint="export the model with a later opset",
        )  # fmt: skip
    return {name: inputs.index(name) for name in removed}


def _move(editor: Editor, node: ir.Node, name: str, place: int) -> None:
    """Convert an attribute to an input."""
    array = np.array(node.attributes[name].value)
    constant = editor.constant(array, array.dtype, name=name)
    if len(node.inputs) <= place:
        node.resize_inputs(place + 1)
    editor.replace_input(node, place, constant)
    editor.remove_attribute(node, name)


def _set_num_outputs(node: ir.Node) -> None:
    """Set `num_outputs`, which opset 18 requires of a `Split` without sizes."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.setdefault("num_outputs", ir.AttrInt64("num_outputs", len(node.outputs)))
