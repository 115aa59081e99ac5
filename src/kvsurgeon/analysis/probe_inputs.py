"""What an experiment is fed: noise for tokens, masks, and numbers that follow from the length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import InputRole
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension
from kvsurgeon.symbolic.sequence_axes import Axes


def batch_axis(shape: Sequence[Dimension] | None) -> int | None:
    """The axis on which the sequences of a batch lie, one behind the other; None where there is none."""
    held = (axis for axis, size in enumerate(shape or ()) if BATCH in getattr(size, "free_symbols", ()))
    return next(held, None)


def side_by_side(mine: np.ndarray, theirs: np.ndarray, axis: int | None) -> np.ndarray:
    """The first of two sequences out of one array, the second out of another."""
    if axis is None or mine is theirs:
        return mine
    half = mine.shape[axis] // 2
    return np.concatenate([mine.take(range(half), axis), theirs.take(range(half, 2 * half), axis)], axis)


def mask(given: InputRole, seen: np.ndarray, row: int | None = None) -> np.ndarray:
    """What an input given for all tokens so far is fed: 1 where a token is seen; a matrix where it has two axes."""
    if row is not None and BATCH in given.dimensions:
        axis = given.dimensions.index(BATCH)
        rows = [mask(given, seen if number == row else np.ones_like(seen)).take([number], axis) for number in (0, 1)]
        return np.concatenate(rows, axis)
    length = len(seen)
    sizes = [int(at_length(size, length)) for size in given.dimensions]
    dtype = given.value.dtype or ir.DataType.INT64
    if not given.lengths:
        return np.ones(sizes, dtype=dtype.numpy())
    array = seen.astype(np.float64)
    if len(given.lengths) == 2:
        allowed = np.tril(np.ones((length, length))) * array
        array = np.where(allowed > 0, 0.0, -1e9) if dtype.is_floating_point() else allowed
    shape = [size if axis in given.lengths else 1 for axis, size in enumerate(sizes)]
    return np.broadcast_to(array.reshape(shape), sizes).astype(dtype.numpy())


def at_length(number: Any, length: int) -> Any:
    """The number for two sequences of that length: two, so that what differs between them shows."""
    if isinstance(number, (int, float, bool)):
        return number
    return dim.substitute(number, ((LENGTH, length), (BATCH, 2)))


def is_decided(numbers: np.ndarray) -> bool:
    """Whether the numbers depend on batch and length only."""
    symbols = {symbol for number in numbers.reshape(-1) for symbol in getattr(number, "free_symbols", ())}
    return symbols <= {BATCH, LENGTH}


def evaluated(numbers: np.ndarray, length: int) -> np.ndarray:
    """Numbers that depend on batch and length only, at that length."""
    flat = [float(at_length(number, length)) for number in numbers.reshape(-1)]
    return np.array(flat).reshape(numbers.shape)


def type_run_as(dtype: ir.DataType) -> int:
    """The type that a tensor is declared with."""
    return int(ir.DataType.FLOAT) if dtype is ir.DataType.BFLOAT16 else int(dtype)


def runs_as(dtype: ir.DataType) -> Any:
    """The type that an array is fed in: runtimes lack kernels for bfloat16."""
    return np.float32 if dtype is ir.DataType.BFLOAT16 else dtype.numpy()


def noise(sizes: Sequence[int], axes: Axes, places: np.ndarray, dtype: ir.DataType | None) -> np.ndarray:
    """Noise in [-3, 3], drawn so that an element depends on its place and on no dimension's size along the tokens."""
    angles = []
    for place, size in enumerate(sizes):
        index = np.arange(size)
        held = next((axis for axis in axes if axis.axis == place), None)
        if held is not None:
            inner = int(at_length(held.inner, len(places)))
            rows = np.concatenate([-2 - np.arange(held.ahead), places, -900 - np.arange(held.behind)])
            block = len(rows) * inner
            index = (index // block) * 7919 + rows[index % block // inner] * 104729 + index % inner
        angles.append((index + 1) * (12.9898 + 78.233 * place) * 43.758)
    wave = 3.0 * _sines_of_sums(angles)
    if dtype is None or dtype.is_floating_point():
        return wave.astype(runs_as(dtype or ir.DataType.FLOAT))
    if dtype is ir.DataType.BOOL:
        return wave > 0
    return np.round(wave * 20 + (64 if dtype.numpy().kind == "u" else 0)).astype(dtype.numpy())


def _sines_of_sums(angles: Sequence[np.ndarray]) -> np.ndarray:
    """sin(a[i] + b[j] + ...) at [i, j, ...]: by the theorem of addition, as a sine of each element takes long."""
    sine, cosine = np.zeros((), np.float32), np.ones((), np.float32)
    for place, angle in enumerate(angles):
        sine, cosine = sine[..., None], cosine[..., None]
        here, beside = np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)
        last = place == len(angles) - 1  # which is as large as all
        sine, cosine = sine * beside + cosine * here, cosine if last else cosine * beside - sine * here
    return sine
