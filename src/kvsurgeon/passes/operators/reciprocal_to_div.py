"""Write divisions as divisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class ReciprocalToDiv:
    """Write a product with a reciprocal as a division, which is what optimisers of runtimes look for.

    Before: `Mul(x, Reciprocal(y))`. After: `Div(x, y)`, which differs in the last bit at most. onnxruntime makes one
    operator of a norm that divides by a root, and leaves six where it is multiplied with the root's reciprocal.

    Not handled: a reciprocal that is an output of the model stays beside the division.
    """

    name: ClassVar[str] = "reciprocal-to-div"

    def apply(self, subject: Subject) -> Outcome:
        """Rewrite the products of `subject.model`."""
        found = list(_products(subject.model.graph))
        if not found:
            return Unchanged(reason="nothing is multiplied with a reciprocal")
        editor = Editor(subject.model)
        for node, place in found:
            reciprocal = node.inputs[place].producer()  # type: ignore[union-attr]
            assert reciprocal is not None
            old = node.outputs[0]
            quotient = ir.Value(name=editor.unique_name(f"{old.name}.quotient"), type=old.type, shape=old.shape)
            editor.operator("", "Div", [node.inputs[1 - place], reciprocal.inputs[0]], {}, [quotient], like=node)
            editor.replace(old, quotient)
        editor.finish()
        return Changed(edits=editor.edits)


def _products(graph: ir.Graph) -> Iterator[tuple[ir.Node, int]]:
    """Products, each with the place of the reciprocal: the second where both are."""
    for node in graph:
        if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
            continue
        places = [place for place, value in enumerate(node.inputs) if _is_reciprocal(value)]
        if places:
            yield node, places[-1]


def _is_reciprocal(value: ir.Value | None) -> bool:
    maker = None if value is None else value.producer()
    return maker is not None and maker.op_type == "Reciprocal" and maker.domain in ("", "ai.onnx")
