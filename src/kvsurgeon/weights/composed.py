"""A tensor made of stored ones: taken along an axis, averaged, joined; chunk by chunk, and only when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

CHUNK = 1 << 24  # bytes that are computed at a time
# Bytes that are handed to the system at a time. More of them make ext4 look for memory in one large piece: 1 GB took
# 1.1 s by 16 MB and 0.3 s by 1 MB.
WRITTEN = 1 << 20

Block = Sequence[tuple[np.ndarray, "Part"]]  # the elements of a stored tensor, and what is taken of them


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Places of one stored tensor along an axis, and how much they count where several parts are averaged."""

    tensor: ir.TensorProtocol
    places: np.ndarray  # [places in the block] of whole numbers
    weight: int = 1


class ComputedTensor(ir.LazyTensor):
    """Blocks side by side along an axis; each is the weighted mean of its parts, of a single one bit by bit.

    Attributes:
        blocks: The parts of each block. Stored tensors are of one type and shape, and are read only on demand.
        axis: The axis along which places are taken, and blocks joined.
        view: The shape in which the stored tensors have that axis, in elements of their type.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Part]],
        *,
        axis: int,
        name: str,
        view: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Take the blocks; `view` is the stored shape and `shape` that of the view with new places, if not given."""
        self.blocks = tuple(tuple(parts) for parts in blocks)
        self.axis = axis
        first = self.blocks[0][0].tensor
        self.view = tuple(first.shape.numpy()) if view is None else tuple(view)
        places = sum(len(parts[0].places) for parts in self.blocks)
        self._taken = (*self.view[:axis], places, *self.view[axis + 1 :])
        whole = ir.Shape(self._taken if shape is None else shape)
        super().__init__(lambda: ir.Tensor(self.numpy()), first.dtype, whole, name=name)
        if math.prod(self._taken) != self.size:
            raise ValueError(f"expected a shape of {math.prod(self._taken)} elements, found {whole}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of all blocks."""
        return tuple(part for parts in self.blocks for part in parts)

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
            stored = piece.view(np.uint8).data if self.dtype.bitwidth >= 8 else memoryview(self._stored(piece))
            for start in range(0, len(stored), WRITTEN):
                file.write(stored[start : start + WRITTEN])

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the elements in order, in flat pieces."""
        with _opened([part.tensor for part in self.parts], self.view) as arrays:
            blocks, start = [], 0
            for parts in self.blocks:
                blocks.append(list(zip(arrays[start : start + len(parts)], parts, strict=True)))
                start += len(parts)
            pieces = self._pieces(blocks)
            if self.dtype.bitwidth < 8:  # packed elements: a piece must end with a byte
                yield np.concatenate(list(pieces))
            else:
                yield from pieces

    def _pieces(self, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
        if self.axis != 0:
            yield from self._by_rows(self._taken[0], blocks)
            return
        for block in blocks:
            yield from self._by_rows(len(block[0][1].places), [block])

    def _by_rows(self, rows: int, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
        """A few rows of the first axis at a time."""
        step = self._rows_at_once()
        for start in range(0, rows, max(step, 1)):
            pieces = [self._mean(block, start, min(start + step, rows)) for block in blocks]
            whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)
            yield np.ascontiguousarray(whole).reshape(-1)

    def _rows_at_once(self) -> int:
        averaged = any(len(parts) > 1 for parts in self.blocks)
        row = math.prod(self._taken[1:]) * (16 if averaged else self.dtype.itemsize)
        return max(1, CHUNK // max(1, int(row)))

    def _mean(self, block: Block, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the block."""
        first, *others = [self._rows(array, part.places, start, stop) for array, part in block]
        if not others:
            return first
        total = block[0][1].weight * first.astype(np.float64)
        for rows, (_, part) in zip(others, block[1:], strict=True):
            total += part.weight * rows.astype(np.float64)
        total /= sum(part.weight for _, part in block)
        mean: np.ndarray = total.astype(first.dtype)
        return mean

    def _rows(self, array: np.ndarray, places: np.ndarray, start: int, stop: int) -> np.ndarray:
        if self.axis == 0:
            return _taken(array, places[start:stop], 0)
        return _taken(array[start:stop], places, self.axis)

    def _stored(self, piece: np.ndarray) -> bytes:
        if self.dtype.bitwidth < 8:
            return ir.Tensor(piece, dtype=self.dtype).tobytes()
        return piece.tobytes()


def _taken(array: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Places of an array along an axis; whole heads at a time where they stand together, which is many times faster."""
    shape = array.shape
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    run = int(np.gcd.reduce([shape[axis], len(places), *breaks, *places[:1], *places[breaks]])) or 1
    heads = array.reshape(*shape[:axis], shape[axis] // run, run, *shape[axis + 1 :])
    return np.take(heads, places[::run] // run, axis=axis).reshape(*shape[:axis], len(places), *shape[axis + 1 :])


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
