"""The transpose of a stored matrix, computed in chunks, and only when it is read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from kvsurgeon.weights.chunked_tensor import CHUNK, ChunkedTensor
from kvsurgeon.weights.mapped import mapped_elements


class TransposedTensor(ChunkedTensor):
    """The transpose of a matrix whose elements have at least 8 bits.

    Attributes:
        matrix: The stored matrix, which is read only when this tensor is.
    """

    def __init__(self, matrix: ir.TensorProtocol, *, name: str) -> None:
        self.matrix = matrix
        rows, columns = matrix.shape.numpy()
        super().__init__(matrix.dtype, ir.Shape((columns, rows)), name=name)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield some rows at a time, in flat arrays."""
        rows, columns = self.matrix.shape.numpy()
        stored = mapped_elements(self.matrix).reshape(rows, columns)
        step = max(1, CHUNK // max(1, rows * stored.itemsize))
        for start in range(0, columns, step):
            yield np.ascontiguousarray(stored[:, start : start + step].T).reshape(-1)
