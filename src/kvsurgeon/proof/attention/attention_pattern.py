"""Attention pattern: the keys that the queries of an attention give weight to, with some tokens masked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from kvsurgeon.analysis.mask_patterns import MaskPattern

MIN_WEIGHT = 1e-6  # smaller weights count as 0


@dataclass(frozen=True, kw_only=True)
class AttentionPattern:
    """The keys that the queries of one attention give weight to, measured on probe inputs.

    Attributes:
        weights: [..., query, key], the attention weights at the longest length.
        padded_weights: [..., query, key], the same with left padding; None if no input masks tokens.
        uniform_weights: [..., query, key], the same with equal scores; None if the scores are not probed.
        leaking: For each mask pattern, [token] of bool: masked queries without a key that attend to later keys.
        attended: For each mask pattern, [token] of bool: masked keys that other queries attend to.
        reach: Number of tokens between a key and a query that attends to it, at most, with some tokens masked.
        limit: The longest length in tokens up to which the pattern is prefix stable; None if there is no limit.
        reduced: Whether scores are reduced over keys outside the weights, which rows were compared for.
        checked: The longest length in tokens at which rows were checked.
        rows_leak: Whether a masked query without a key attends to later keys in the rows of long texts.
        rows_attend: Whether masked keys are attended to in the rows of long texts.
        opens_block: Whether an input may let tokens of the first call attend to later ones; it did not in the weights.
        rows: The weights that some queries give to equal scores at that length, [..., key], by query: those near
            positions at which the weights may change, and others.
    """

    weights: np.ndarray
    padded_weights: np.ndarray | None = None
    uniform_weights: np.ndarray | None = None
    leaking: dict[MaskPattern, np.ndarray] = field(default_factory=dict)
    attended: dict[MaskPattern, np.ndarray] = field(default_factory=dict)
    reach: int = 0
    limit: int | None = None
    reduced: bool = False
    checked: int = 0
    rows_leak: bool = False
    rows_attend: bool = False
    opens_block: bool = False
    rows: Mapping[int, np.ndarray] = field(default_factory=dict)


def is_attended(weights: np.ndarray) -> np.ndarray:
    """Return [..., query, key] of bool: whether the query gives weight to the key."""
    return np.asarray(np.abs(weights) > MIN_WEIGHT)


def attends_to_all(weights: np.ndarray, first_query: int = 0) -> np.ndarray:
    """Return [..., query, 1] of bool: whether the query attends to every key, later ones included."""
    to_all = np.asarray(is_attended(weights).all(axis=-1, keepdims=True))
    if first_query + weights.shape[-2] == weights.shape[-1]:
        to_all[..., -1, :] = False  # the last query has no later key
    return to_all


def queries_without_key(
    weights: np.ndarray, to_all: np.ndarray, visible: np.ndarray, first_query: int = 0
) -> np.ndarray:
    """Return [..., query, 1] of bool: masked queries with all keys masked, whose softmax gives weight to every key.

    Visible queries are excluded, because their results are read.

    Args:
        weights: [..., query, key], the weights with no token masked.
        to_all: [..., query, 1] of bool: whether the query attends to all keys with some tokens masked.
        visible: [key] of bool: whether the key is not masked.
        first_query: Position of the first query.
    """
    without_key = ~(is_attended(weights) & visible).any(axis=-1, keepdims=True)
    of_queries = visible[first_query : first_query + weights.shape[-2], None]
    return np.asarray((without_key | to_all) & ~of_queries)


def leaking_queries(weights: np.ndarray, without_key: np.ndarray, first_query: int = 0) -> np.ndarray:
    """Return [query] of bool: queries without a key that attend to a later key."""
    later = is_attended(np.triu(np.nan_to_num(weights), 1 + first_query))
    return np.asarray((later & without_key).any(axis=-1).reshape(-1, weights.shape[-2]).any(axis=0))


def attended_keys(weights: np.ndarray) -> np.ndarray:
    """Return [key] of bool: keys that some query attends to."""
    return np.asarray(is_attended(weights).reshape(-1, weights.shape[-1]).any(axis=0))


def longest_reach(weights: np.ndarray, visible: np.ndarray) -> int:
    """Return the largest distance of a visible query, `[query]` of bool, from a key that it attends to."""
    attended = is_attended(weights).reshape(-1, *weights.shape[-2:]).any(axis=0)
    queries, keys = np.nonzero(attended & visible[:, None])
    return int((queries - keys).max(initial=0))


def largest_weight_on_later_key(weights: np.ndarray, first_query: int = 0) -> tuple[float, int, int]:
    """Return the largest weight on a key after the query, the query, and the key; NaN if any weight is.

    Args:
        weights: [..., query, key].
        first_query: Position of the first query.
    """
    by_key = weights.reshape(-1, *weights.shape[-2:])
    largest = np.maximum(by_key.max(axis=0), -by_key.min(axis=0))  # [query, key]
    if np.isnan(largest).any():
        return math.nan, first_query, 0
    later = np.triu(largest, 1 + first_query)
    *_, query, key = np.unravel_index(int(later.argmax()), later.shape)
    return float(later.max(initial=0.0)), int(query) + first_query, int(key)
