"""Small constants of a graph, in initializers or `Constant` nodes. Weights are never read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.query import is_operator

TINY = 64  # elements; up to this size a tensor is a scalar or mask value, not a weight, even in external data
SMALL = 4096  # elements; up to this size a tensor is a shape or a frequency table, not a weight matrix


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or `Constant` node without reading it; None for other values.

    An `Identity` of one is the same tensor: exporters write it where several modules share a weight.
    """
    node = None if value is None else value.producer()
    while node is not None and is_operator(node, "Identity"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if value is None:
        return None
    if node is None:
        return value.const_value if value.is_initializer() else None
    if not is_operator(node, "Constant"):
        return None
    attribute = next(iter(node.attributes.data.values()))  # a plain dict, which is faster to walk
    if attribute.type is ir.AttributeType.TENSOR:
        tensor: ir.TensorProtocol = attribute.value  # `as_tensor` checks the protocol, which is slow
        return tensor
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
        return ir.Tensor(np.array(attribute.value, dtype=np.int64))
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return ir.Tensor(np.array(attribute.value, dtype=np.float32))
    return None


def is_weight(tensor: ir.TensorProtocol) -> bool:
    """Return whether a tensor must not be read: it is large, or floating-point external data."""
    if tensor.size > SMALL:
        return True
    return isinstance(tensor, ir.ExternalTensor) and tensor.dtype.is_floating_point() and tensor.size > TINY


def small_constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the content of a small constant; None for weights and other values."""
    tensor = constant_tensor(value)
    if tensor is None or is_weight(tensor):
        return None
    try:
        return tensor.numpy()
    except (OSError, ValueError):  # its file is missing
        return None
