"""Tensors that are computed in chunks, and only when they are read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

CHUNK = 1 << 24  # bytes that are computed at a time
# Bytes per system call. With more, ext4 searches for a large free extent: writing 1 GB took 1.1 s by 16 MB and 0.3 s by
# 1 MB.
WRITTEN = 1 << 20


class ChunkedTensor(ir.LazyTensor):
    """A tensor whose elements `chunks` yields."""

    def __init__(self, dtype: ir.DataType, shape: ir.Shape, *, name: str) -> None:
        super().__init__(lambda: ir.Tensor(self.numpy()), dtype, shape, name=name)

    def __repr__(self) -> str:
        """Describe the tensor without computing it."""
        return f"{type(self).__name__}<{self.dtype},{self.shape}>(name={self.name!r})"

    @abstractmethod
    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the elements in order, in flat arrays; with packed elements each ends with a byte."""

    def numpy(self) -> np.ndarray:
        """Compute all elements."""
        chunks = list(self.chunks())
        elements = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        return elements.reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Compute all elements, for numpy."""
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def tobytes(self) -> bytes:
        """Compute all elements in the format of ONNX."""
        return b"".join(self._packed(chunk) for chunk in self.chunks())

    def tofile(self, file: Any) -> None:
        """Write the elements in the format of ONNX, with one chunk of them in memory."""
        for chunk in self.chunks():
            packed = chunk.view(np.uint8).data if self.dtype.bitwidth >= 8 else memoryview(self._packed(chunk))
            for start in range(0, len(packed), WRITTEN):
                file.write(packed[start : start + WRITTEN])

    def _packed(self, chunk: np.ndarray) -> bytes:
        return chunk.tobytes() if self.dtype.bitwidth >= 8 else ir.Tensor(chunk, dtype=self.dtype).tobytes()
