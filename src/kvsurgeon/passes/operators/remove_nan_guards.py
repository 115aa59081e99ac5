"""Replace `Where(IsNaN(w), 0, w)` by `w` after softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.fusion.score_path import guarded_value
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.patterns import Replacement, rewrite
from kvsurgeon.graph.query import producer_of, through, upstream
from kvsurgeon.ops.content import content_inputs
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class RemoveNanGuards:
    """Remove NaN guards after softmax.

    Before: `Where(IsNaN(w), 0, w)` after a softmax, for queries whose keys are all masked. After: `w`. Softmax gives
    no NaN if masked scores are finite.

    Not handled: masks of minus infinity, which `float16-mask-range` and `host-inputs` replace. A mask that is a float
    input of the model must be finite.
    """

    name: ClassVar[str] = "remove-nan-guards"

    def apply(self, subject: Subject) -> Outcome:
        """Remove the NaN guards of `subject.model`.

        Raises:
            UnsupportedError: A mask is minus infinity.
        """
        edits = rewrite(subject.model, _unguarded)
        return Changed(edits=edits) if edits else Unchanged(reason="no softmax has a NaN guard")


def _unguarded(node: ir.Node) -> Replacement | None:
    """Match a NaN guard after softmax."""
    weights = guarded_value(node)
    if weights is None or node.outputs[0].is_graph_output():
        return None
    softmax = through(weights, lambda node: has_trait(node, Trait.IDENTITY))
    if producer_of(softmax, "Softmax") is None:
        return None
    _check_finite(softmax)
    return Replacement(value=node.outputs[0], build=lambda _: weights, keep_name=False)


def _check_finite(weights: ir.Value) -> None:
    """Check that no constant between score product and softmax is minus infinity.

    Raises:
        UnsupportedError: One is.
    """
    for value in upstream([weights], stop=_is_product, inputs=content_inputs):
        node = producer_of(value, "ConstantOfShape")
        fill = None if node is None else node.attributes.get("value")
        tensor = constant_tensor(value) if fill is None else fill.as_tensor()
        if tensor is not None and tensor.dtype.is_floating_point() and bool(np.any(tensor.numpy() == -np.inf)):
            raise UnsupportedError(
                "softmax gives NaN for a query whose keys are all masked by minus infinity",
                code=Code.PASS_PRECONDITION, at=value.name, expected="a finite mask", found="-inf",
                hint="run float16-mask-range first",
            )  # fmt: skip


def _is_product(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and has_trait(node, Trait.PRODUCT)
