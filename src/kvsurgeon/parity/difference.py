"""Measured errors: the difference of two arrays, per token, and the part of an output that a chunk must equal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvsurgeon.runtime import Array

ErrorMap = npt.NDArray[np.float64]  # [batch, sequence]: error of each token

_SPREAD_SAMPLE = 2**20  # numbers from which a spread is estimated


def spread(values: Array) -> float:
    """Return half the distance between the 16th and the 84th percentile of the finite values.

    For a normal distribution this is the standard deviation. Unlike that, it ignores a few extreme entries, such as the
    masked tokens of a padded vocabulary. Unlike the range, it does not grow with the vocabulary: one tolerance serves
    128 tokens and 128,000.

    >>> normal = np.random.default_rng(0).standard_normal(10_000)
    >>> f"{spread(normal):.1f} {spread(np.append(normal, -1e9)):.1f}"
    '1.0 1.0'
    """
    flat = values.reshape(-1)
    sample = flat[:: max(1, flat.size // _SPREAD_SAMPLE)].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 1.0
    low, high = np.percentile(sample, (16, 84))
    return float((high - low) / 2) or float(sample.std()) or 1.0


def amplitude(values: Array) -> float:
    """Return the spread, or a tenth of the largest value if that is more.

    Keys and hidden states of trained models have features a hundred times larger than the rest, and rounding is
    relative to them.
    """
    finite = np.abs(values[np.isfinite(values)], dtype=np.float64)
    return max(spread(values), float(finite.max(initial=0.0)) / 10)


def expected_part(whole: Array, shape: tuple[int, ...], past: int, total: int) -> Array | None:
    """Return the part of a whole text's output that the call on the tokens `past:total` must equal.

    The sizes show which axes follow the query length and which the total length. None is returned if they do not fit.
    """
    if len(shape) != whole.ndim:
        return None
    spans = {total - past: slice(past, total), total: slice(0, total)}
    part: list[slice] = []
    for have, want in zip(whole.shape, shape, strict=True):
        if have != want and (want not in spans or have < total):
            return None
        part.append(slice(None) if have == want else spans[want])
    return whole[tuple(part)]


def distance(expected: Array, found: Array, scale: float, *, equal_nan: bool = False) -> float:
    """Return the largest difference of two arrays divided by a scale; infinite at NaN, unless both are NaN and equal.

    Args:
        expected: Expected values.
        found: Found values, of the same shape.
        scale: Divisor of the differences.
        equal_nan: Whether two NaNs are equal.
    """
    if equal_nan and expected.size:
        both = np.isnan(expected.astype(np.float64)) & np.isnan(found.astype(np.float64))
        expected, found = np.where(both, 0, expected), np.where(both, 0, found)
    flat = (array.reshape(1, 1, -1) for array in (expected, found))
    return float(error_map(*flat, batch=0, sequence=1, scale=scale).max(initial=0.0))


def error_map(expected: Array, found: Array, *, batch: int, sequence: int, scale: float) -> ErrorMap:
    """Return the error of each token: the largest difference, divided by a scale.

    Args:
        expected: Expected values.
        found: Found values, of the same shape.
        batch: Batch axis.
        sequence: Sequence axis.
        scale: Divisor of the differences.
    """
    want, have = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.where(want == have, 0.0, np.abs(want - have))  # infinities may be equal
    error = np.moveaxis(np.where(np.isnan(error), np.inf, error) / scale, (batch, sequence), (0, 1))
    errors: ErrorMap = error.reshape(*error.shape[:2], -1).max(axis=2, initial=0.0)
    return errors


def worst(errors: ErrorMap, counted: npt.NDArray[np.bool_], start: int = 0) -> tuple[float, int, int]:
    """Return the largest error among the tokens that count, with its row and token; the first token is `start`."""
    if not counted.any():
        return 0.0, 0, start
    row, column = np.unravel_index(np.where(counted, errors, -1.0).argmax(), errors.shape)
    return float(errors[row, column]), int(row), start + int(column)


def agreement(expected: Array, found: Array, counted: npt.NDArray[np.bool_], tie: float) -> tuple[int, int]:
    """Return the number of tokens whose most likely next token agrees, and the number of tokens that count.

    Args:
        expected: Logits, `[batch, sequence, vocabulary]`.
        found: Logits of the same shape.
        counted: Tokens that count, `[batch, sequence]`.
        tie: Difference below which two logits are equally likely.
    """
    want, have = expected.astype(np.float64), found.astype(np.float64)
    choice = np.nan_to_num(have, nan=-np.inf).argmax(axis=-1)[..., None]
    chosen = np.take_along_axis(want, choice, axis=-1)[..., 0]
    same = chosen >= want.max(axis=-1) - tie
    return int((same & counted).sum()), int(counted.sum())
