"""Opset versions: what raise-opset and lower-opset have in common."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import STANDARD_DOMAINS

OLDEST = 13  # since then Softmax has one axis, and no operator changes its meaning under the same inputs
NEWEST = onnx.defs.onnx_opset_version()


def declared_opset(model: ir.Model) -> int:
    """Return the opset version of a model."""
    return model.graph.opset_imports.get("", 1)


def check_convertible(model: ir.Model, oldest: int, change: str) -> None:
    """Check that a model can be converted to another opset.

    Args:
        model: The model.
        oldest: Earlier one of the two versions.
        change: Participle for the message, such as "raised".

    Raises:
        UnsupportedError: The earlier version is too old, or the model has functions.
    """
    if oldest < OLDEST or model.functions:
        raise UnsupportedError(
            f"the opset cannot be {change}", code=Code.OPSET, expected=f"opset {OLDEST} or later, and no functions",
            found=f"opset {oldest}" if oldest < OLDEST else "a model with functions",
        )  # fmt: skip


def standard_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of standard operators, including those of subgraphs."""
    return [node for node in model.graph.all_nodes() if node.domain in STANDARD_DOMAINS]


def is_redefined(node: ir.Node) -> bool:
    """Return whether a node means something else in another opset, with the same inputs and attributes.

    A `DFT` has another default axis since opset 20, and a `GroupNormalization` another shape of scales since 21.
    """
    if node.op_type == "DFT":
        return "axis" not in node.attributes and (len(node.inputs) < 3 or node.inputs[2] is None)
    return node.op_type == "GroupNormalization"


def schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """Return the schema of an operator in an opset; None if the opset lacks it."""
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def ir_version(opset: int) -> int:
    """Return the first IR version that supports an opset."""
    rows = [row for row in onnx.helper.VERSION_TABLE if row[2] >= opset]
    return int(rows[0][1]) if rows else int(onnx.IR_VERSION)
