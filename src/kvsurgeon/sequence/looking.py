"""Which tokens are seen when context is tried, and how its results are laid out to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kvsurgeon.errors import Refused
from kvsurgeon.sequence.axes import Axes, Length
from kvsurgeon.sequence.experiment import at_length

Pattern = Callable[[int], np.ndarray]  # of the length: which tokens are seen


def all_seen(length: int) -> np.ndarray:
    """Every token is seen."""
    return np.ones(length, dtype=bool)


def left_padded(length: int) -> np.ndarray:
    """The first two tokens are padding."""
    return np.arange(length) >= 2


def with_holes(length: int) -> np.ndarray:
    """Some tokens in the middle are not seen; the first always is."""
    return np.arange(length) % 7 < 5


def cut_short(length: int) -> np.ndarray:
    """The second half is not there yet."""
    return np.arange(length) < length // 2


def unfolded(array: np.ndarray, axes: Axes, length: int) -> np.ndarray:
    """The array with what holds tokens last, queries before keys, and everything else before them.

    Raises:
        Refused: It has no such axes.
    """
    sizes: list[int] = []
    places: dict[int, int] = {}
    for axis, size in enumerate(array.shape):
        held = next((held for held in axes if held.axis == axis), None)
        if held is None:
            sizes.append(size)
            continue
        sizes += [int(at_length(held.outer, length)), length, int(at_length(held.inner, length))]
        places[axis] = len(sizes) - 2
    if math.prod(sizes) != array.size:
        raise Refused(
            "tokens do not lie where they were followed to", expected=f"axes {sizes}", found=str(list(array.shape))
        )
    ordered = sorted(axes, key=lambda held: held.role.resolved() is not Length.NEW)
    last = [places[held.axis] for held in ordered]
    return np.moveaxis(array.reshape(sizes), last, range(-len(last), 0)) if last else array.reshape(sizes)


def close(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two arrays are the same up to the rounding of their type."""
    if left.dtype.kind != "f":
        return bool(np.array_equal(left, right))
    step = float(np.finfo(left.dtype).eps)  # 1e-7 in float32, 1e-3 in float16
    return bool(np.allclose(left, right, rtol=max(1e-4, 8 * step), atol=max(1e-5, step), equal_nan=True))


def difference(left: np.ndarray, right: np.ndarray) -> str:
    """How two arrays differ, in words."""
    if left.shape != right.shape:
        return f"shapes {list(left.shape)} and {list(right.shape)}"
    if (np.isnan(left) != np.isnan(right)).any():
        return "a number at one length, and none (NaN) at another"
    gap = np.abs(left.astype(np.float64) - right.astype(np.float64))
    return f"a difference of {np.nanmax(gap):.2g}"
