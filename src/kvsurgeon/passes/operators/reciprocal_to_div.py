"""Replace `x * (1 / y)` by `x / y`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from kvsurgeon.graph.patterns import Replacement, rewrite
from kvsurgeon.graph.query import is_operator, producer_of
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class ReciprocalToDiv:
    """Replace `x * (1 / y)` by `x / y`, which the fusions of runtimes match.

    Before: `Mul(x, Reciprocal(y))`. After: `Div(x, y)`, equal up to the last bit. onnxruntime fuses an RMS norm with
    `Div` to one operator, and leaves six operators with `Reciprocal`.

    Not handled: a reciprocal that is also an output of the model stays.
    """

    name: ClassVar[str] = "reciprocal-to-div"

    def apply(self, subject: Subject) -> Outcome:
        """Rewrite `subject.model`."""
        edits = rewrite(subject.model, _div)
        return Changed(edits=edits) if edits else Unchanged(reason="no Mul reads a Reciprocal")


def _div(node: ir.Node) -> Replacement | None:
    """Match a product with a reciprocal; the second input if both are one."""
    found = [place for place, value in enumerate(node.inputs) if producer_of(value, "Reciprocal")]
    if not found or not is_operator(node, "Mul"):
        return None
    numerator, output = 1 - found[-1], node.outputs[0]
    reciprocal = producer_of(node.inputs[found[-1]], "Reciprocal")
    assert reciprocal is not None
    return Replacement(
        value=output,
        build=lambda editor: editor.node(
            "Div", [node.inputs[numerator], reciprocal.inputs[0]], name=f"{output.name}.quotient", like=node
        ),
    )
