"""Mask patterns for probe runs, and the arrays that probe runs return with their sequence axes last."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kvsurgeon.analysis.probe_inputs import Rows, at_length
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.symbolic.sequence_axes import Axes, Length, SequenceAxis

MaskPattern = Callable[[int], np.ndarray]  # length -> [length] of bool, True for each token that is not masked

LEFT_PADDING = 3  # masked tokens before a text, which end inside a block of two, four or eight
LONG_PADDING = 31  # a prime number, which ends inside any block


def unmasked(length: int) -> np.ndarray:
    """Mask no token."""
    return np.ones(length, dtype=bool)


def all_masked(length: int) -> np.ndarray:
    """Mask every token."""
    return np.zeros(length, dtype=bool)


def left_padded(length: int) -> np.ndarray:
    """Mask the first tokens, as many as `LEFT_PADDING`."""
    return np.arange(length) >= LEFT_PADDING


def with_gaps(length: int) -> np.ndarray:
    """Mask two of every seven tokens, never the first."""
    return np.arange(length) % 7 < 5


def padded_with_gaps(length: int) -> np.ndarray:
    """Mask the first tokens, as many as `LONG_PADDING`, and those that `with_gaps` masks."""
    return np.asarray((np.arange(length) >= LONG_PADDING) & with_gaps(length))


def first_half(length: int) -> np.ndarray:
    """Mask the second half of the tokens."""
    return np.arange(length) < length // 2


def padded_until(count: int) -> MaskPattern:
    """Return the pattern that masks the first tokens, as many as `count`."""
    return lambda length: np.arange(length) >= count


def sequence_last(array: np.ndarray, axes: Axes, rows: Rows) -> np.ndarray:
    """Return the array with its sequence axes last, queries before keys, and without learned rows.

    Raises:
        UnsupportedError: The size of the array does not fit its sequence axes.
    """
    result = _with_learned_rows(array, axes, rows)
    for place, axis in enumerate(queries_first(axes), start=-len(axes)):
        if axis.learned_rows:
            tokens = result.shape[place] - axis.learned_rows
            result = result.take(range(axis.rows_before, axis.rows_before + tokens), axis=place)
    return result


def learned_rows_first(array: np.ndarray, axes: Axes, rows: Rows) -> np.ndarray:
    """Return the learned rows that `sequence_last` drops on the first axis; the other sequence axes stay last."""
    result = _with_learned_rows(array, axes, rows)
    ordered = enumerate(queries_first(axes), start=-len(axes))
    place, axis = next((place, axis) for place, axis in ordered if axis.learned_rows)
    size = result.shape[place]
    learned = [*range(axis.rows_before), *range(size - axis.rows_after, size)]
    return np.moveaxis(result.take(learned, axis=place), place, 0)


def queries_first(axes: Axes) -> list[SequenceAxis]:
    """Return sequence axes in the order of `sequence_last`: those of queries before those of keys."""
    return sorted(axes, key=lambda axis: axis.variable.resolved() is not Length.NEW)


def _with_learned_rows(array: np.ndarray, axes: Axes, rows: Rows) -> np.ndarray:
    sizes: list[int] = []
    places: dict[int, int] = {}
    by_number = {axis.axis: axis for axis in axes}
    for number, size in enumerate(array.shape):
        if (axis := by_number.get(number)) is None:
            sizes.append(size)
            continue
        outer, inner = (int(at_length(part, rows.total, rows.batch)) for part in (axis.outer, axis.inner))
        sizes += [outer, rows.tokens(axis) + axis.learned_rows, inner]
        places[number] = len(sizes) - 2
    if math.prod(sizes) != array.size:
        raise UnsupportedError(
            "the size of a tensor does not fit the sequence axes traced for it",
            code=Code.INCONSISTENT_SHAPES, expected=f"axes {sizes}", found=str(list(array.shape)),
        )  # fmt: skip
    last = [places[axis.axis] for axis in queries_first(axes)]
    return np.moveaxis(array.reshape(sizes), last, range(-len(last), 0)) if last else array.reshape(sizes)


def is_close(left: np.ndarray, right: np.ndarray) -> bool:
    """Return whether two arrays are equal up to the rounding of their type."""
    if left.dtype.kind != "f":
        return bool(np.array_equal(left, right))
    step = float(np.finfo(left.dtype).eps)  # 1e-7 in float32, 1e-3 in float16
    bound = max(1e-5, step)
    if left.dtype == np.float16:  # in which numpy computes slowly
        left, right = left.astype(np.float32), right.astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.abs(left - right).max(initial=0.0)
    return bool(gap <= bound or np.allclose(left, right, rtol=max(1e-4, 8 * step), atol=bound, equal_nan=True))


def describe_difference(left: np.ndarray, right: np.ndarray) -> str:
    """Return the difference of two arrays as text for a message."""
    if left.shape != right.shape:
        return f"shapes {list(left.shape)} and {list(right.shape)}"
    if (np.isnan(left) != np.isnan(right)).any():
        return "NaN at one length only"
    gap = np.abs(left.astype(np.float64) - right.astype(np.float64))
    return f"a difference of {np.nanmax(gap):.2g}"
