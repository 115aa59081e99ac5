"""A tensor that is made of stored ones: taken along an axis, or averaged; chunk by chunk, only when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

CHUNK = 1 << 24  # bytes that are computed at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Places of one stored tensor along an axis, and how much they count where several parts are averaged."""

    tensor: ir.TensorProtocol
    places: np.ndarray  # [number of places in the result] of whole numbers
    weight: int = 1


class ComputedTensor(ir.LazyTensor):
    """The weighted mean of places that are taken from stored tensors; of a single part, its elements bit by bit.

    Attributes:
        parts: Where the elements come from. Stored tensors are of one type and shape, and are read only on demand.
        axis: The axis along which places are taken.
        view: The shape in which the stored tensors have that axis, in elements of their type.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        axis: int,
        name: str,
        view: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Take the parts; `view` is the stored shape and `shape` that of the view with the new places, if not given."""
        self.parts = tuple(parts)
        self.axis = axis
        self.view = tuple(self.parts[0].tensor.shape.numpy()) if view is None else tuple(view)
        self._taken = (*self.view[:axis], len(self.parts[0].places), *self.view[axis + 1 :])
        whole = ir.Shape(self._taken if shape is None else shape)
        super().__init__(lambda: ir.Tensor(self.numpy()), self.parts[0].tensor.dtype, whole, name=name)
        if math.prod(self._taken) != self.size:
            raise ValueError(f"expected a shape of {math.prod(self._taken)} elements, found {whole}")

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors that are read, computed ones followed to what is stored."""
        found: list[ir.TensorProtocol] = []
        for part in self.parts:
            found += part.tensor.sources if isinstance(part.tensor, ComputedTensor) else [part.tensor]
        return tuple(found)

    def __repr__(self) -> str:
        """Say what it is without computing it."""
        return f"{type(self).__name__}<{self.dtype},{self.shape}>(name={self.name!r})"

    def numpy(self) -> np.ndarray:
        """Compute all elements."""
        pieces = list(self.chunks())
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return whole.reshape(self.shape.numpy())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Compute all elements, for numpy."""
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def tobytes(self) -> bytes:
        """Compute all elements, as they are stored."""
        return b"".join(self._stored(piece) for piece in self.chunks())

    def tofile(self, file: Any) -> None:
        """Write the elements as they are stored, no more than a chunk of them in memory."""
        for piece in self.chunks():
            file.write(self._stored(piece))

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the elements in order, in flat pieces."""
        with _opened([part.tensor for part in self.parts], self.view) as arrays:
            rows = self._taken[0]
            step = rows if self.dtype.bitwidth < 8 else self._rows_at_once()
            for start in range(0, max(rows, 1), max(step, 1)):
                yield self._rows(arrays, start, min(start + step, rows))

    def _rows_at_once(self) -> int:
        row = math.prod(self._taken[1:]) * self.dtype.itemsize * (1 if len(self.parts) == 1 else 8)
        return max(1, CHUNK // max(1, int(row)))

    def _rows(self, arrays: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
        """Places [start, stop) of the first axis of the result."""
        if len(self.parts) == 1:
            return np.ascontiguousarray(self._taken_of(arrays[0], self.parts[0], start, stop)).reshape(-1)
        total = np.zeros((stop - start, *self._taken[1:]), dtype=np.float64)
        for array, part in zip(arrays, self.parts, strict=True):
            total += part.weight * self._taken_of(array, part, start, stop).astype(np.float64)
        total /= sum(part.weight for part in self.parts)
        return total.astype(arrays[0].dtype).reshape(-1)

    def _taken_of(self, array: np.ndarray, part: Part, start: int, stop: int) -> np.ndarray:
        if self.axis == 0:
            return np.take(array, part.places[start:stop], axis=0)
        return np.take(array[start:stop], part.places, axis=self.axis)

    def _stored(self, piece: np.ndarray) -> bytes:
        if self.dtype.bitwidth < 8:
            return ir.Tensor(piece, dtype=self.dtype).tobytes()
        return piece.tobytes()


@contextmanager
def _opened(tensors: Sequence[ir.TensorProtocol], view: Sequence[int]) -> Iterator[list[np.ndarray]]:
    """Give the tensors' elements; files are mapped within the block only, so that their pages are given back."""
    arrays = [_elements(tensor).reshape(view) for tensor in tensors]
    try:
        yield arrays
    finally:
        arrays.clear()


def _elements(tensor: ir.TensorProtocol) -> np.ndarray:
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8 or not tensor.size:
        return tensor.numpy()
    return np.memmap(
        tensor.path, dtype=tensor.dtype.numpy(), mode="r", offset=tensor.offset or 0, shape=tuple(tensor.shape.numpy())
    )
