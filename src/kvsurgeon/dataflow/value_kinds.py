"""Three kinds of tensor: constants, context, and token data.

Context depends on the inputs only through shapes and through what is given for all tokens so far, such as a padding
mask: it can be computed anew at any length. Token data depends on what is given for the new tokens alone, and must be
remembered.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.graph.query import all_inputs


class ValueKind(IntEnum):
    """In rising order: a node's result is of the highest kind among its inputs."""

    CONSTANT = 0
    CONTEXT = 1
    TOKEN = 2


def classify_values(nodes: Iterable[ir.Node], inputs: list[InputRole], shapes: Shapes) -> dict[ir.Value, ValueKind]:
    """Return the kind of every value that a node makes or a graph input holds; what is missing is constant."""
    kinds: dict[ir.Value, ValueKind] = {
        given.value: ValueKind.TOKEN if given.is_token else ValueKind.CONTEXT for given in inputs
    }
    for node in nodes:
        kind = ValueKind.CONSTANT
        if node.op_type in SHAPE_ONLY:
            kind = max(
                (min(kinds.get(value, ValueKind.CONSTANT), ValueKind.CONTEXT) for value in node.inputs if value),
                default=kind,
            )
        else:
            for value in node.inputs[:1] if node.op_type == "CastLike" else all_inputs(node):  # its second gives a type
                kind = max(kind, ValueKind.CONSTANT if value is None else kinds.get(value, ValueKind.CONSTANT))
        if (
            kind is ValueKind.TOKEN
            and (fact := shapes.facts.get(node.outputs[0])) is not None
            and fact.value is not None
        ):
            kind = ValueKind.CONTEXT  # its numbers are known whatever the tokens are
        if kind is not ValueKind.CONSTANT:
            for value in node.outputs:
                kinds[value] = kind
    return kinds
