"""Content: what a node reads of its inputs besides their shape, and values that are zero whatever their shape."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import all_inputs, is_fed, is_operator, upstream
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

_COMPARED = 1 << 22  # elements; up to this size a tensor is compared with zeros
_EXPANSIONS = (Trait.IDENTITY, Trait.RESHAPE, Trait.TRANSPOSE, Trait.REPEAT)


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


def is_zero(value: ir.Value | None) -> bool:
    """Return whether all elements of a value are zero, by the constant that it is an expansion of."""
    node = None if value is None else value.producer()
    while node is not None and has_trait(node, *_EXPANSIONS):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if is_operator(node, "ConstantOfShape"):
        assert node is not None
        filling = node.attributes.get("value")
        return filling is None or not filling.as_tensor().numpy().any()
    tensor = constant_tensor(value)
    if tensor is None or tensor.size > _COMPARED or tensor.dtype is ir.DataType.STRING:
        return False
    try:
        return not tensor.numpy().any()
    except (OSError, ValueError):  # its file is missing
        return False
