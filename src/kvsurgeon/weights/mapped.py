"""Elements of stored tensors, mapped from their files."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def mapped_elements(tensor: ir.TensorProtocol) -> np.ndarray:
    """Return the elements of a tensor: of external data, on a mapping that is closed with the array.

    `ExternalTensor.numpy` keeps every page in memory that was ever read.

    Raises:
        OSError: The file of the tensor is missing.
        ValueError: It is too short.
    """
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8 or not tensor.size:
        return tensor.numpy()
    shape = tuple(tensor.shape.numpy())
    return np.memmap(tensor.path, dtype=tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=shape)
