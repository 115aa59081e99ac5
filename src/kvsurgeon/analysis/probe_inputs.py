"""Probe inputs of a subgraph: synthetic token data, masks, and numbers that follow from the length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import InputRole, MaskForm
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, LENGTH, Dimension, Extent
from kvsurgeon.symbolic.sequence_axes import Axes, Length, LengthVariable, SequenceAxis


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a probe run: queries are the tokens from `start` to `stop`, keys are all `total` tokens."""

    start: int
    stop: int
    total: int
    batch: int = 2  # sequences

    @classmethod
    def of_text(cls, length: int) -> Rows:
        """Return all tokens of a text."""
        return cls(0, length, length)

    @property
    def queries(self) -> np.ndarray:
        """The positions of the queries."""
        return np.arange(self.start, self.stop)

    @property
    def keys(self) -> np.ndarray:
        """The positions of the keys."""
        return np.arange(self.total)

    def tokens(self, axis: SequenceAxis) -> int:
        """Return the number of tokens on a sequence axis."""
        count = self.stop - self.start if axis.variable.resolved() is Length.NEW else self.total
        return count if axis.most is None else min(axis.most, count)

    def size(self, axis: SequenceAxis) -> int:
        """Return the size of a sequence axis."""
        return int(at_length(axis.size(self.tokens(axis)), self.total, self.batch))

    def sizes(self, shape: Sequence[Dimension], axes: Axes = ()) -> list[int]:
        """Return a shape whose sequence axes are known; an unknown size counts as 1."""
        result = [at_length(size, self.total, self.batch) for size in shape]
        for axis in axes:
            result[axis.axis] = self.size(axis)
        return [size if isinstance(size, int) else 1 for size in result]


EXTENT = 9  # size of an axis that is neither the batch nor the tokens
AMPLIFIED = 1 << 20  # added to the number of a token, makes its values larger
BLANK = -1  # number of a token whose values are 0
AMPLIFICATION = 900.0  # how many times larger: beyond what a maximum or a bound of other tokens hides


def at_length(number: Any, length: int, batch: int = 2) -> Any:
    """Return a symbolic number for a batch of sequences of that length; other extents have a fixed size."""
    if isinstance(number, (int, float, bool, np.number, np.bool_)):
        return number
    return dim.at(_with_fixed_extents(number), length, batch)


@dim.cached
def _with_fixed_extents(number: Dimension) -> Dimension:
    if isinstance(number, int):
        return number
    return dim.substitute(number, tuple((one, EXTENT) for one in sorted(number.atoms(Extent), key=str)))


def follows_from_length(numbers: np.ndarray) -> bool:
    """Return whether the numbers depend on nothing but the sizes of inputs."""
    symbols = {symbol for number in numbers.reshape(-1) for symbol in getattr(number, "free_symbols", ())}
    return all(symbol in (BATCH, LENGTH) or isinstance(symbol, Extent) for symbol in symbols)


def evaluate(numbers: np.ndarray, rows: Rows) -> np.ndarray:
    """Return symbolic numbers that depend on batch and length as an array of floats."""
    flat = [float(at_length(number, rows.total, rows.batch)) for number in numbers.reshape(-1)]
    return np.array(flat).reshape(numbers.shape)


def run_dtype(dtype: ir.DataType) -> ir.DataType:
    """Return the type that a tensor has in a probe run: float32 for bfloat16, which runtimes lack kernels for."""
    return ir.DataType.FLOAT if dtype is ir.DataType.BFLOAT16 else dtype


def batch_axis(shape: Sequence[Dimension] | None) -> int | None:
    """Return the index of the first axis whose size depends on the batch; None if there is none."""
    axes = (axis for axis, size in enumerate(shape or ()) if BATCH in getattr(size, "free_symbols", ()))
    return next(axes, None)


def join_sequences(first: np.ndarray, second: np.ndarray, axis: int | None) -> np.ndarray:
    """Return the first sequence of one batch of two and the second sequence of another."""
    if axis is None or first is second:
        return first
    half = first.shape[axis] // 2
    return np.concatenate([first.take(range(half), axis), second.take(range(half, 2 * half), axis)], axis)


_NUMBERS_OF_FORM = {MaskForm.KEPT: (1.0, 0.0), MaskForm.HIDDEN: (0.0, 1.0), MaskForm.ADDED: (0.0, -1e9)}


def mask_input(
    given: InputRole,
    visible: np.ndarray,
    sequence: int | None = None,
    rows: Rows | None = None,
    number: float | None = None,
) -> np.ndarray:
    """Return the array for an input that masks tokens, in its form; a matrix if the input has two lengths.

    Args:
        given: The input.
        visible: [length] of bool, False for each masked token.
        sequence: Index of the only sequence to mask; None to mask both.
        rows: The tokens of the run; all of them by default.
        number: The elements of an input without tokens; that of its role by default.
    """
    if sequence is not None and BATCH in given.dimensions:
        axis = given.dimensions.index(BATCH)
        masks = [visible if row == sequence else np.ones_like(visible) for row in (0, 1)]
        arrays = [mask_input(given, mask, rows=rows, number=number) for mask in masks]
        return np.concatenate([array.take([row], axis) for row, array in enumerate(arrays)], axis)
    rows = rows or Rows.of_text(len(visible))
    sizes = _input_sizes(given, rows)
    dtype = given.value.dtype or ir.DataType.INT64
    if not given.lengths:
        return np.full(sizes, given.number if number is None else number).astype(dtype.numpy())
    is_kept = visible
    if len(given.lengths) == 2:
        is_kept = (rows.keys <= rows.queries[:, None]) & visible
    elif Length.NEW in given.lengths.values():
        is_kept = visible[rows.queries]
    kept, hidden = _NUMBERS_OF_FORM[given.mask_form]
    array = np.where(is_kept, kept, hidden)
    shape = [size if axis in given.lengths else 1 for axis, size in enumerate(sizes)]
    return np.broadcast_to(array.reshape(shape), sizes).astype(dtype.numpy())


def block_input(given: InputRole, end: int, rows: Rows, numbers: np.ndarray | None = None) -> np.ndarray:
    """Return the array for an input that opens a block of the first tokens.

    Args:
        given: The input.
        end: Number of tokens of the first call: the number if the input has no tokens.
        rows: The tokens of the run.
        numbers: [end], what it holds for tokens of the first call, where 0 stands for its number after them, and that
            number for 0; 1 by default.
    """
    sizes = _input_sizes(given, rows)
    dtype = (given.value.dtype or ir.DataType.INT64).numpy()
    if not given.lengths:
        return np.full(sizes, end).astype(dtype)
    opened = np.zeros(max(end, rows.total))
    opened[:end] = 1 if numbers is None else numbers
    opened = np.where(opened == given.number, 0, np.where(opened == 0, given.number, opened))
    shape = [size if axis in given.lengths else 1 for axis, size in enumerate(sizes)]
    return np.broadcast_to(opened[: rows.total].reshape(shape), sizes).astype(dtype)


def position_input(given: InputRole, rows: Rows) -> np.ndarray:
    """Return the array for an input of positions: 0, 1, 2, ..."""
    sizes = _input_sizes(given, rows)
    shape = [size if axis in given.lengths else 1 for axis, size in enumerate(sizes)]
    dtype = given.value.dtype or ir.DataType.INT64
    positions = rows.queries if Length.NEW in given.lengths.values() else rows.keys
    rounded = positions.reshape(shape).astype(dtype.numpy()).astype(run_dtype(dtype).numpy())
    return np.broadcast_to(rounded, sizes)


def _input_sizes(given: InputRole, rows: Rows) -> list[int]:
    axes = tuple(SequenceAxis(axis, LengthVariable(length)) for axis, length in given.lengths.items())
    return rows.sizes(given.dimensions, axes)


def synthetic_values(
    sizes: Sequence[int], axes: Axes, tokens: np.ndarray, dtype: ir.DataType | None,
    queries: np.ndarray | None = None, tensor: int = 0,
) -> np.ndarray:  # fmt: skip
    """Return values that look random and depend on the token, not on the length: in [-3, 3] unless it is amplified.

    Those of a blank token are 0.

    Args:
        sizes: The shape.
        axes: The sequence axes.
        tokens: [length], the number of the token at each position: equal numbers give equal values.
        dtype: The type; float32 if unknown.
        queries: [sequence_length], the same on axes of the new tokens if they are not all tokens.
        tensor: A number of the tensor: those with other numbers have other values, so that exchanging them shows.
    """
    angles, amplification = [], np.ones((), np.float32)
    for place, size in enumerate(sizes):
        index = np.arange(size)
        axis = next((axis for axis in axes if axis.axis == place), None)
        if axis is not None:
            inner = int(at_length(axis.inner, len(tokens)))
            here = tokens if queries is None or axis.variable.resolved() is not Length.NEW else queries
            rows = np.concatenate([-2 - np.arange(axis.rows_before), here, -900 - np.arange(axis.rows_after)])
            block = len(rows) * inner
            numbers = rows[index % block // inner]
            amplified = np.where(numbers >= AMPLIFIED, np.float32(AMPLIFICATION), (numbers != BLANK).astype(np.float32))
            amplification = amplification * amplified.reshape(-1, *[1] * (len(sizes) - place - 1))
            index = (index // block) * 7919 + rows[index % block // inner] * 104729 + index % inner
        further = 0.618034 * tensor if axis is None else 0.0  # sums over tokens stay as small as they are
        angles.append((index + 1) * (12.9898 + 78.233 * place + further) * 43.758 + tensor)
    wave = _sines_of_sums(angles)
    wave *= 3.0
    dtype = run_dtype(dtype or ir.DataType.FLOAT)
    if dtype.is_floating_point():
        if (amplification != 1).any():
            largest = min(np.finfo(dtype.numpy()).max, np.finfo(np.float32).max)  # a float16 holds no amplified pair
            wave = np.clip(wave * amplification, -largest, largest)
        return wave.astype(dtype.numpy(), copy=False)
    if dtype is ir.DataType.BOOL:
        return (wave > 0) & (amplification > 0)
    whole = np.round(wave * 20 + (64 if dtype.numpy().kind == "u" else 0))
    return (whole * (amplification > 0)).astype(dtype.numpy())


def _sines_of_sums(angles: Sequence[np.ndarray]) -> np.ndarray:
    """Return sin(a[i] + b[j] + ...) at [i, j, ...] by angle addition: fewer sines than one per element."""
    sine, cosine = np.zeros((), np.float32), np.ones((), np.float32)
    for place, angle in enumerate(angles):
        sine, cosine = sine[..., None], cosine[..., None]
        sine_here, cosine_here = np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)
        last = place == len(angles) - 1  # the largest array, whose cosines are not needed
        mixed = sine * cosine_here
        mixed += cosine * sine_here
        sine, cosine = mixed, cosine if last else cosine * cosine_here - sine * sine_here
    return sine
