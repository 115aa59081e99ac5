"""What moving a model between versions of ONNX's operators has in common, up or down."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from kvsurgeon.errors import UnsupportedError

OLDEST = 13  # since then a Softmax works along one axis, and no operator has changed its meaning under the same inputs
NEWEST = onnx.defs.onnx_opset_version()

# Operators that one version reads otherwise than another, though a node is written alike in both.
OTHERWISE = frozenset({"GroupNormalization"})


def declared_opset(model: ir.Model) -> int:
    """Return the version of ONNX's operators that a model is written in."""
    return model.graph.opset_imports.get("", 1)


def check_movable(model: ir.Model, oldest: int, moved: str) -> None:
    """Leave quietly if a model can be written in another version.

    Args:
        model: It.
        oldest: The earlier of the two versions.
        moved: What is done to the opset, for the message.

    Raises:
        UnsupportedError: The earlier version is too old, or the model calls functions of its own.
    """
    if oldest < OLDEST or model.functions:
        found = f"opset {oldest}" if oldest < OLDEST else "functions of its own"
        raise UnsupportedError(
            f"the opset cannot be {moved}", expected=f"opset {OLDEST} or later, and no functions", found=found
        )


def standard_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the nodes of ONNX's own operators, those of inner graphs included."""
    return [node for node in model.graph.all_nodes() if node.domain in ("", "ai.onnx")]


def ir_version(opset: int) -> int:
    """Return the first version of the format that knows an opset."""
    rows = [row for row in onnx.helper.VERSION_TABLE if row[2] >= opset]
    return int(rows[0][1]) if rows else int(onnx.IR_VERSION)
