"""Trust weights of attention to be numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class WithoutNanGuards:
    """Leave out what replaces weights that are no numbers, where softmax made them.

    Before: `Where(IsNaN(w), 0, w)` behind a softmax, for queries that see no key at all. After: `w`. Softmax gives
    numbers wherever scores are numbers: with masks that hide by a finite number, every row is.

    Not handled: masks of minus infinity, which is for the caller to know; `half-range-masks` and `give-context` leave
    none.
    """

    name: ClassVar[str] = "without-nan-guards"

    def apply(self, subject: Subject) -> Outcome:
        """Take the guards out of `subject.model`."""
        editor = Editor(subject.model)
        guards = [node for node in subject.model.graph if _is_guard(node)]
        if not guards:
            return Unchanged(reason="no softmax is guarded")
        for node in guards:
            weights = node.inputs[2]
            assert weights is not None
            node.outputs[0].replace_all_uses_with(weights)
            editor.edits += 1
        editor.finish()
        return Changed(edits=editor.edits)


def _is_guard(node: ir.Node) -> bool:
    """Whether a node chooses another number where the weights of a softmax are none."""
    if node.op_type != "Where" or node.outputs[0].is_graph_output():
        return False
    condition, _, weights = node.inputs
    asked = None if condition is None else condition.producer()
    maker = None if weights is None else weights.producer()
    if asked is None or maker is None or asked.op_type != "IsNaN" or asked.inputs[0] is not weights:
        return False
    while maker.op_type in ("Cast", "Identity") and maker.inputs[0] is not None:
        behind = maker.inputs[0].producer()
        if behind is None:
            return False
        maker = behind
    return maker.op_type == "Softmax"
