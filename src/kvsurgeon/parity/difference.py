"""Measured errors: the difference of two arrays, per token, and the part of an output that a chunk must equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvsurgeon.runtime import Array

ErrorMap = npt.NDArray[np.float64]  # [batch, sequence]: error of each token
Scale = float | npt.NDArray[Any]  # divisor of differences, which broadcasts to the values

_SPREAD_SAMPLE = 2**20  # numbers from which a spread is estimated
_CONTAMINATED = 50  # ratio of spreads that no distribution without masked entries has
_FEW = 512  # numbers of which hardly any lie between the highest percentiles
_DISTINCT = 1e-3  # relative difference of percentiles below which the numbers between them differ by rounding
_RELATIVE = 3  # scales above which a number is compared relative to itself
_BLOCK = 2**20  # numbers that are compared at a time


def spread(values: Array) -> float:
    """Return half the distance between the 16th and the 84th percentile of the finite values.

    For a normal distribution this is the standard deviation. Unlike the range, it does not grow with the vocabulary:
    one tolerance serves 128 tokens and 128,000. If masked tokens make this distance more than 50 times a distance
    between percentiles on one side, which for a normal distribution is equal, it is the latter.

    >>> normal = np.random.default_rng(0).standard_normal(10_000)
    >>> f"{spread(normal):.1f} {spread(np.append(normal, np.full(8_000, -1e9))):.1f}"
    '1.0 0.7'
    """
    flat = values.reshape(-1)
    sample = flat[:: max(1, flat.size // _SPREAD_SAMPLE)].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 1.0
    lowest, low, high, higher, highest = np.percentile(sample, (2.3, 16, 84, 97.7, 99.7)).tolist()
    half = (high - low) / 2
    between = [(lowest, low), (high, higher), (higher, highest)][: 2 if sample.size < _FEW else 3]
    sides = [to - start for start, to in between if to - start > _DISTINCT * max(abs(start), abs(to))]
    if sides and half > _CONTAMINATED * min(sides):
        return float(min(sides))
    return half or float(sample.std()) or 1.0


def scale_of(values: Array, features: tuple[int, int] | None = None) -> Scale:
    """Return the scale of errors: the spread, and for each feature its own spread if that is more.

    Keys and hidden states of trained models have features a hundred times larger than the rest, and rounding is
    relative to them.

    Args:
        values: Expected values.
        features: Batch and sequence axis, if all other axes are features.
    """
    whole = spread(values)
    if features is None or not values.size:
        return whole
    finite = np.where(np.isfinite(values), values, 0).astype(np.float32)
    low, high = np.percentile(finite, (16, 84), axis=features, keepdims=True)
    scale: Scale = np.maximum((high - low) / 2, whole)
    return scale


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


def distance(expected: Array, found: Array, scale: Scale | None = None) -> float:
    """Return the largest difference of two arrays of one shape, divided by a scale, or by the spread of the first."""
    scale = spread(expected) if scale is None else scale
    flat = (array.reshape(1, 1, -1) for array in (expected, found))
    whole = np.broadcast_to(scale, expected.shape).reshape(1, 1, -1)
    return float(error_map(*flat, batch=0, sequence=1, scale=whole).max(initial=0.0))


def error_map(expected: Array, found: Array, *, batch: int, sequence: int, scale: Scale) -> ErrorMap:
    """Return the error of each token: the largest difference, divided by a scale.

    Numbers of more than three scales are compared relative to themselves, so that a mask of -1e9 hides nothing. Two
    NaNs are equal, a NaN and a number differ by infinity.

    Args:
        expected: Expected values.
        found: Found values, of the same shape.
        batch: Batch axis.
        sequence: Sequence axis.
        scale: Divisor of the differences; it broadcasts to the values.
    """
    axes, to = (batch, sequence), (0, 1)
    divisor = np.moveaxis(np.broadcast_to(scale, expected.shape), axes, to)
    expected, found = np.moveaxis(expected, axes, to), np.moveaxis(found, axes, to)
    errors: ErrorMap = np.zeros((expected.shape[0], expected.shape[1]))
    block = max(1, _BLOCK // max(1, expected[:, :1].size))
    for start in range(0, errors.shape[1], block):
        part = (slice(None), slice(start, start + block))
        want, have = expected[part].astype(np.float64), found[part].astype(np.float64)
        with np.errstate(invalid="ignore"):
            equal = (want == have) | (np.isnan(want) & np.isnan(have))
            error = np.where(equal, 0.0, np.abs(want - have))  # infinities may be equal
            error /= np.fmax(divisor[part], np.abs(want) / _RELATIVE)
        error = np.where(np.isnan(error), np.where(equal, 0.0, np.inf), error)
        errors[part] = error.reshape(*error.shape[:2], -1).max(axis=2, initial=0.0)
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
    want, have = (np.nan_to_num(logits.astype(np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
                  for logits in (expected, found))  # fmt: skip
    choice = have.argmax(axis=-1)[..., None]
    chosen = np.take_along_axis(want, choice, axis=-1)[..., 0]
    same = chosen >= want.max(axis=-1) - tie
    return int((same & counted).sum()), int(counted.sum())
