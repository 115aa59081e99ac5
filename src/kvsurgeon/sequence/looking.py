"""What context is fed when it is tried, and how its results are laid out to be looked at."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.sequence.axes import Axes, Length
from kvsurgeon.sequence.experiment import at_length
from kvsurgeon.sequence.kinds import GivenInput


def all_seen(given: GivenInput, length: int) -> np.ndarray:
    """Every token is seen."""
    return _mask(given, length, np.ones(length))


def left_padded(given: GivenInput, length: int) -> np.ndarray:
    """The first two tokens are padding."""
    return _mask(given, length, np.arange(length) >= 2)


def cut_short(given: GivenInput, length: int) -> np.ndarray:
    """The second half is not there yet."""
    return _mask(given, length, np.arange(length) < length // 2)


def _mask(given: GivenInput, length: int, row: np.ndarray) -> np.ndarray:
    """What an input given for all tokens so far is fed: 1 where a token is seen; a matrix where it has two axes."""
    sizes = [int(at_length(size, length)) for size in given.dimensions]
    dtype = given.value.dtype or ir.DataType.INT64
    array = np.asarray(row, dtype=np.float64)
    if len(given.lengths) == 2:
        allowed = np.tril(np.ones((length, length))) * array
        array = np.where(allowed > 0, 0.0, -1e9) if dtype.is_floating_point() else allowed
    shape = [1] * len(sizes)
    for axis in given.lengths:
        shape[axis] = sizes[axis]
    if not given.lengths:
        return np.ones(sizes, dtype=dtype.numpy())
    return np.broadcast_to(array.reshape(shape), sizes).astype(dtype.numpy())


def unfolded(array: np.ndarray, axes: Axes, length: int) -> np.ndarray:
    """The array with what holds tokens last, queries before keys, and everything else before them."""
    sizes: list[int] = []
    places: dict[int, int] = {}
    for axis, size in enumerate(array.shape):
        held = next((held for held in axes if held.axis == axis), None)
        if held is None:
            sizes.append(size)
            continue
        sizes += [int(at_length(held.outer, length)), length, int(at_length(held.inner, length))]
        places[axis] = len(sizes) - 2
    ordered = sorted(axes, key=lambda held: held.role.resolved() is not Length.NEW)
    last = [places[held.axis] for held in ordered]
    return np.moveaxis(array.reshape(sizes), last, range(-len(last), 0)) if last else array.reshape(sizes)


def close(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays are the same up to rounding."""
    if left.dtype.kind not in "fc":
        return bool(np.array_equal(left, right))
    return bool(np.allclose(left, right, rtol=1e-4, atol=1e-5, equal_nan=True))


def difference(left: np.ndarray, right: np.ndarray) -> str:
    """How two arrays differ, in words."""
    if left.shape != right.shape:
        return f"shapes {list(left.shape)} and {list(right.shape)}"
    gap = np.abs(left.astype(np.float64) - right.astype(np.float64))
    return f"a difference of {np.nanmax(gap):.2g}"
