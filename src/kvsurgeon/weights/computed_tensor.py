"""A tensor of slices of stored tensors, averaged and concatenated; it is computed in chunks, and only when read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from kvsurgeon.weights.chunked_tensor import CHUNK, ChunkedTensor
from kvsurgeon.weights.mapped import mapped_elements

Block = Sequence[tuple[np.ndarray, "TensorSlice"]]  # elements of each stored tensor, and what to take of them


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSlice:
    """A part of a stored tensor.

    Attributes:
        tensor: The stored tensor, which is read only when the slice is.
        indices: Integers along the axis of the `ComputedTensor`.
        weight: Weight of the slice in the mean of its block.
    """

    tensor: ir.TensorProtocol
    indices: np.ndarray
    weight: int = 1


class ComputedTensor(ChunkedTensor):
    """Blocks concatenated along an axis. A block of one slice is bitwise equal to it; of several, their weighted mean.

    Attributes:
        blocks: The slices of each block, of tensors of one type and shape.
        axis: The axis of indices and concatenation.
        view: The shape of the stored tensors that has this axis.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[TensorSlice]],
        *,
        axis: int,
        name: str,
        view: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Create the tensor; by default `view` is the stored shape, and `shape` is `view` with new indices."""
        self.blocks = tuple(tuple(block) for block in blocks)
        self.axis = axis
        first = self.slices[0].tensor
        self.view = tuple(first.shape.numpy()) if view is None else tuple(view)
        size = sum(len(block[0].indices) for block in self.blocks)
        self._sliced_shape = (*self.view[:axis], size, *self.view[axis + 1 :])
        own_shape = ir.Shape(self._sliced_shape if shape is None else shape)
        super().__init__(first.dtype, own_shape, name=name)
        if math.prod(self._sliced_shape) != self.size:
            raise ValueError(f"expected a shape of {math.prod(self._sliced_shape)} elements, found {own_shape}")

    @property
    def slices(self) -> tuple[TensorSlice, ...]:
        """The slices of all blocks."""
        return tuple(part for block in self.blocks for part in block)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the elements in order, in flat arrays."""
        # Files are mapped as long as this runs, so that their pages are released afterwards.
        blocks = [[(mapped_elements(part.tensor).reshape(self.view), part) for part in block] for block in self.blocks]
        try:
            chunks = self._chunks(blocks)
            if self.dtype.bitwidth < 8:  # packed elements: a chunk must end with a byte
                yield np.concatenate(list(chunks))
            else:
                yield from chunks
        finally:
            blocks.clear()

    def _chunks(self, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
        if self.axis != 0:
            yield from self._rows(self._sliced_shape[0], blocks)
            return
        for block in blocks:
            yield from self._rows(len(block[0][1].indices), [block])

    def _rows(self, count: int, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
        """Yield some rows of the first axis at a time."""
        averaged = any(len(block) > 1 for block in self.blocks)
        row = math.prod(self._sliced_shape[1:]) * (16 if averaged else self.dtype.itemsize)
        step = max(1, CHUNK // max(1, int(row)))
        for start in range(0, count, step):
            parts = [self._mean(block, start, min(start + step, count)) for block in blocks]
            rows = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=self.axis)
            yield np.ascontiguousarray(rows).reshape(-1)

    def _mean(self, block: Block, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a block."""
        first, *others = [self._take(array, part.indices, start, stop) for array, part in block]
        if not others:
            return first
        total = block[0][1].weight * first.astype(np.float64)
        for rows, (_, part) in zip(others, block[1:], strict=True):
            total += part.weight * rows.astype(np.float64)
        total /= sum(part.weight for _, part in block)
        mean: np.ndarray = total.astype(first.dtype)
        return mean

    def _take(self, array: np.ndarray, indices: np.ndarray, start: int, stop: int) -> np.ndarray:
        if self.axis == 0:
            return _take_runs(array, indices[start:stop], 0)
        return _take_runs(array[start:stop], indices, self.axis)


def _take_runs(array: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    """Return `np.take`; runs of consecutive indices, such as heads, are taken as one element, which is much faster."""
    shape = array.shape
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    run = int(np.gcd.reduce([shape[axis], len(indices), *breaks, *indices[:1], *indices[breaks]])) or 1
    runs = array.reshape(*shape[:axis], shape[axis] // run, run, *shape[axis + 1 :])
    return np.take(runs, indices[::run] // run, axis=axis).reshape(*shape[:axis], len(indices), *shape[axis + 1 :])
