"""How far two arrays are apart, where, and which part of the whole a chunk must equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvsurgeon.runtime import Array

Map = npt.NDArray[np.float64]  # [batch, sequence]: an error for each token

_SPREAD_SAMPLE = 2**20  # numbers from which a spread is estimated


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest difference between what was expected and what was found, and where it is."""

    error: float  # over the spread of what was expected; infinite where something found is not a number
    row: int
    position: int


def spread(values: Array) -> float:
    """Return half the distance between the 16th and the 84th percentile of the finite values.

    For a normal distribution that is the standard deviation. Unlike the deviation it is not moved by a handful of
    entries that are fixed far off (masked tokens of a padded vocabulary), and unlike the distance of the extremes it
    does not grow with the vocabulary: one tolerance serves 128 tokens and 128,000.

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
    """Return the spread, or a tenth of the largest value where that is more.

    Keys and hidden states of trained models have features a hundred times larger than the rest, and rounding is
    relative to them.
    """
    finite = np.abs(values[np.isfinite(values)], dtype=np.float64)
    return max(spread(values), float(finite.max(initial=0.0)) / 10)


def expected_part(whole: Array, found: tuple[int, ...], past: int, total: int) -> Array | None:
    """Return the part of an output for the whole text that a call adding `past:total` must equal.

    Which axes follow the new tokens and which all tokens so far is read from the sizes; None where they do not fit.
    """
    if len(found) != whole.ndim:
        return None
    spans = {total - past: slice(past, total), total: slice(0, total)}
    part: list[slice] = []
    for have, want in zip(whole.shape, found, strict=True):
        if have != want and (want not in spans or have < total):
            return None
        part.append(slice(None) if have == want else spans[want])
    return whole[tuple(part)]


def distance(expected: Array, found: Array, scale: float) -> float:
    """Return the largest difference of two arrays over a scale; infinite where one is not a number."""
    return float(error_map(expected.reshape(1, 1, -1), found.reshape(1, 1, -1), batch=0, sequence=1, scale=scale).max())


def error_map(expected: Array, found: Array, *, batch: int, sequence: int, scale: float) -> Map:
    """Return the largest error of each token, over a scale.

    Args:
        expected: What should be there.
        found: What is there, of the same shape.
        batch: Axis of the batch.
        sequence: Axis of the tokens.
        scale: What an error is measured in.
    """
    want, have = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(want == have, 0.0, np.abs(want - have))  # equal infinities do not differ
    apart = np.where(np.isnan(apart), np.inf, apart) / scale
    apart = np.moveaxis(apart, (batch, sequence), (0, 1))
    errors: Map = apart.reshape(*apart.shape[:2], -1).max(axis=2, initial=0.0)
    return errors


def worst(errors: Map, counted: npt.NDArray[np.bool_], start: int = 0) -> Difference:
    """Return the largest error among the tokens that count, `start` being the position of the first."""
    if not counted.any():
        return Difference(error=0.0, row=0, position=start)
    row, column = np.unravel_index(np.where(counted, errors, -1.0).argmax(), errors.shape)
    return Difference(error=float(errors[row, column]), row=int(row), position=start + int(column))


def agreement(expected: Array, found: Array, counted: npt.NDArray[np.bool_], slack: float) -> tuple[int, int]:
    """Return at how many tokens the likeliest next one is the same, or tied within the slack; and how many count.

    Args:
        expected: Logits, `[batch, sequence, vocabulary]`.
        found: Logits of the same shape.
        counted: Which tokens count, `[batch, sequence]`.
        slack: Difference below which two logits are a tie.
    """
    want, have = expected.astype(np.float64), found.astype(np.float64)
    choice = np.nan_to_num(have, nan=-np.inf).argmax(axis=-1)[..., None]
    chosen = np.take_along_axis(want, choice, axis=-1)[..., 0]
    same = chosen >= want.max(axis=-1) - slack
    return int((same & counted).sum()), int(counted.sum())
