"""Trust weights of attention to be numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.graph.query import all_inputs
from kvsurgeon.ops.contraction import PRODUCTS
from kvsurgeon.passes.contract import Changed, Outcome, Subject, Unchanged


@dataclass(frozen=True, kw_only=True)
class RemoveNanGuards:
    """Leave out what replaces weights that are no numbers, where softmax made them.

    Before: `Where(IsNaN(w), 0, w)` behind a softmax, for queries that see no key at all. After: `w`. Softmax gives
    numbers wherever scores are numbers: with masks that hide by a finite number, every row is.

    Not handled: masks of minus infinity; `float16-mask-range` and `host-inputs` leave none. A mask that the model is
    given as numbers is for the caller to keep finite.
    """

    name: ClassVar[str] = "remove-nan-guards"

    def apply(self, subject: Subject) -> Outcome:
        """Take the guards out of `subject.model`.

        Raises:
            UnsupportedError: A mask may be minus infinity.
        """
        guards = [node for node in subject.model.graph if _guarded(node) is not None]
        if not guards:
            return Unchanged(reason="no softmax is guarded")
        for node in guards:
            _check_finite(node)
        editor = Editor(subject.model)
        for node in guards:
            weights = node.inputs[2]
            assert weights is not None
            node.outputs[0].replace_all_uses_with(weights)
            editor.edits += 1
        editor.finish()
        return Changed(edits=editor.edits)


def _guarded(node: ir.Node) -> ir.Node | None:
    """The softmax whose weights a node replaces where they are no numbers; None if it does something else."""
    if node.op_type != "Where" or node.outputs[0].is_graph_output():
        return None
    condition, _, weights = node.inputs
    asked = None if condition is None else condition.producer()
    maker = None if weights is None else weights.producer()
    if asked is None or maker is None or asked.op_type != "IsNaN" or asked.inputs[0] is not weights:
        return None
    while maker.op_type in ("Cast", "Identity") and maker.inputs[0] is not None:
        behind = maker.inputs[0].producer()
        if behind is None:
            return None
        maker = behind
    return maker if maker.op_type == "Softmax" else None


def _check_finite(guard: ir.Node) -> None:
    """Hold that no number which scores are made of, be it added or chosen, is minus infinity.

    Raises:
        UnsupportedError: One is.
    """
    softmax = _guarded(guard)
    assert softmax is not None
    for value, tensor in _numbers_behind(softmax):
        if tensor.dtype.is_floating_point() and bool(np.any(tensor.numpy() == -np.inf)):
            raise UnsupportedError(
                "softmax makes weights that are no numbers where a mask hides every key by minus infinity",
                at=value.name, expected="masks that hide by a finite number", found="-inf",
                hint="run float16-mask-range before, which leaves none",
            )  # fmt: skip


def _numbers_behind(node: ir.Node) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The constants that a node's numbers are made of, as far as the products that scores are."""
    seen: set[ir.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node in seen or node.op_type in PRODUCTS:
            continue
        seen.add(node)
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            yield node.outputs[0], node.attributes["value"].as_tensor()
        for value in () if node.op_type in SHAPE_ONLY else all_inputs(node):
            tensor = constant_tensor(value)
            maker = value.producer()
            if tensor is not None:
                yield value, tensor
            elif maker is not None:
                pending.append(maker)
