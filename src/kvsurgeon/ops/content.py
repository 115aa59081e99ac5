"""Content: what a node reads of its inputs besides their shape."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.graph.query import all_inputs, is_fed, upstream
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait


def is_shape_only(node: ir.Node) -> bool:
    """Return whether a node reads only the shape of its input, such as `Shape`."""
    return has_trait(node, Trait.SHAPE_ONLY)


def content_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the values whose content a node reads, including those that its subgraphs capture.

    As the parameter `inputs` of a walk: `upstream([mask], inputs=content_inputs)`.
    """
    return [] if is_shape_only(node) else all_inputs(node)


def depends_on_input(value: ir.Value) -> bool:
    """Return whether the content of a value, not only its shape, comes from an input that the caller must feed."""
    return any(is_fed(source) for source in upstream([value], inputs=content_inputs))
