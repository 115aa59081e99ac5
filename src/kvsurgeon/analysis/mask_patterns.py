"""Which tokens are seen when context is tried, and how its results are laid out to be looked at."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

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

    Rows of the model's own that stand beside the tokens are left out.

    Raises:
        UnsupportedError: It has no such axes.
    """
    whole = _unfolded(array, axes, length)
    for place, axis in enumerate(_in_order(axes), start=-len(axes)):
        whole = whole.take(range(axis.ahead, axis.ahead + length), axis=place) if axis.border else whole
    return whole


def border_of(array: np.ndarray, axes: Axes, length: int) -> np.ndarray:
    """What `unfolded` leaves out: rows beside the tokens, which come first here; the other axes as there."""
    whole = _unfolded(array, axes, length)
    place, axis = next((place, axis) for place, axis in enumerate(_in_order(axes), start=-len(axes)) if axis.border)
    beside = [*range(axis.ahead), *range(axis.ahead + length, axis.border + length)]
    return np.moveaxis(whole.take(beside, axis=place), place, 0)


def beside_border(axes: Axes) -> Axes:
    """The axes that hold tokens in what `border_of` gives."""
    return tuple(axis for axis in axes if not axis.border)


def has_border(axes: Axes) -> bool:
    """Whether rows of the model's own stand beside the tokens."""
    return any(axis.border for axis in axes)


def _in_order(axes: Axes) -> list[SequenceAxis]:
    return sorted(axes, key=lambda held: held.role.resolved() is not Length.NEW)


def _unfolded(array: np.ndarray, axes: Axes, length: int) -> np.ndarray:
    sizes: list[int] = []
    places: dict[int, int] = {}
    for axis, size in enumerate(array.shape):
        held = next((held for held in axes if held.axis == axis), None)
        if held is None:
            sizes.append(size)
            continue
        sizes += [int(at_length(held.outer, length)), length + held.border, int(at_length(held.inner, length))]
        places[axis] = len(sizes) - 2
    if math.prod(sizes) != array.size:
        raise UnsupportedError(
            "tokens do not lie where they were followed to", expected=f"axes {sizes}", found=str(list(array.shape))
        )
    last = [places[held.axis] for held in _in_order(axes)]
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
