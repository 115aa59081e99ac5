"""The transpose of a stored matrix, computed in chunks, and only when it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.weights.computed_tensor import CHUNK
from kvsurgeon.weights.mapped import mapped_elements


class TransposedTensor(ir.LazyTensor):
    """The transpose of a matrix whose elements have at least 8 bits.

    Attributes:
        matrix: The stored matrix, which is read only when this tensor is.
    """

    def __init__(self, matrix: ir.TensorProtocol, *, name: str) -> None:
        self.matrix = matrix
        rows, columns = matrix.shape.numpy()
        super().__init__(lambda: ir.Tensor(self.numpy()), matrix.dtype, ir.Shape((columns, rows)), name=name)

    def __repr__(self) -> str:
        """Describe the tensor without computing it."""
        return f"{type(self).__name__}<{self.dtype},{self.shape}>(name={self.name!r})"

    def numpy(self) -> np.ndarray:
        """Compute all elements."""
        return np.concatenate(list(self.chunks()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Compute all elements, for numpy."""
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def tobytes(self) -> bytes:
        """Compute all elements in the format of ONNX."""
        return b"".join(chunk.tobytes() for chunk in self.chunks())

    def tofile(self, file: Any) -> None:
        """Write the elements in the format of ONNX, with one chunk of them in memory."""
        for chunk in self.chunks():
            file.write(chunk.view(np.uint8).data)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield some rows at a time."""
        rows, columns = self.matrix.shape.numpy()
        stored = mapped_elements(self.matrix).reshape(rows, columns)
        step = max(1, CHUNK // max(1, rows * stored.itemsize))
        for start in range(0, columns, step):
            yield np.ascontiguousarray(stored[:, start : start + step].T)
