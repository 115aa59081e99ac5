"""Small constants, wherever a model keeps them; weights are never read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

TINY = 64  # elements; an epsilon, a mask's number: no weight wherever it is kept
SMALL = 4096  # elements; a shape, an axis list, a table of frequencies, never a weight matrix


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a `Constant` node, unread; None for anything else."""
    if value is None:
        return None
    node = value.producer()
    if node is None:
        return value.const_value if value.is_initializer() else None
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.type is ir.AttributeType.TENSOR:
        return attribute.as_tensor()
    if attribute.type in (ir.AttributeType.INT, ir.AttributeType.INTS):
        return ir.Tensor(np.array(attribute.value, dtype=np.int64))
    if attribute.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return ir.Tensor(np.array(attribute.value, dtype=np.float32))
    return None


def is_weight(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is one that must stay unread: large, or floating-point in a file of its own."""
    if tensor.size > SMALL:
        return True
    return isinstance(tensor, ir.ExternalTensor) and tensor.dtype.is_floating_point() and tensor.size > TINY


def small_constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of a small constant; None for weights and for what is not constant."""
    tensor = constant_tensor(value)
    if tensor is None or is_weight(tensor):
        return None
    try:
        return tensor.numpy()
    except (OSError, ValueError):  # kept in a file that is not here
        return None
