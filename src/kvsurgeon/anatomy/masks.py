"""Classify an attention mask by the attention weights that it allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kvsurgeon.analysis.mask_patterns import LEFT_PADDING
from kvsurgeon.anatomy.facts import Mask
from kvsurgeon.proof.attention.attention_pattern import MIN_WEIGHT, AttentionPattern


def read_mask(pattern: AttentionPattern) -> Mask:
    """Return the mask of an attention layer from its measured attention pattern."""
    weights = pattern.weights if pattern.uniform_weights is None else pattern.uniform_weights
    visible = _visible(weights)
    padded = pattern.padded_weights
    padding = padded is not None and bool((np.abs(padded[..., LEFT_PADDING:, :LEFT_PADDING]) <= MIN_WEIGHT).all())
    mask = _structure(visible)
    if mask.kind in ("causal", "sliding-window") and pattern.rows:
        of_rows = _structure_of_rows({query: _visible(row[..., None, :])[0] for query, row in pattern.rows.items()})
        mask = of_rows if mask.kind == "causal" or of_rows == mask else Mask(kind="other")
    if mask.window is not None and pattern.reach >= mask.window:
        mask = Mask(kind="other")  # a window of tokens that are not masked
    return replace(mask, padding=padding, bias=_has_bias(pattern), block=pattern.opens_block)


def _visible(weights: np.ndarray) -> np.ndarray:
    """Return [query, key] of bool: whether any head gives the key a weight, however small a steep bias makes it."""
    return np.asarray((weights != 0).reshape(-1, *weights.shape[-2:]).any(axis=0))


def _structure_of_rows(rows: Mapping[int, np.ndarray]) -> Mask:
    """Return the kind of mask that makes these keys visible to some queries of a long text, [key] by query."""
    starts = {query: int(visible.argmax()) for query, visible in rows.items()}
    if any(int(visible.sum()) != query + 1 - starts[query] for query, visible in rows.items()):
        return Mask(kind="other")
    if not any(starts.values()):
        return Mask(kind="causal")
    last = max(rows)
    window = last + 1 - starts[last]
    if all(start == max(0, query + 1 - window) for query, start in starts.items()):
        return Mask(kind="sliding-window", window=window)
    chunk = math.gcd(*starts.values())
    if all(start == query // chunk * chunk for query, start in starts.items()):
        return Mask(kind="chunked", chunk=chunk)
    return Mask(kind="other")


def _structure(visible: np.ndarray) -> Mask:
    """Return the kind of mask that makes these keys visible, `[queries, keys]`."""
    length = visible.shape[-1]
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    causal = key <= query
    if np.array_equal(visible, causal):
        return Mask(kind="causal")
    window = int(visible[-1].sum())
    if np.array_equal(visible, causal & (query - key < window)):
        return Mask(kind="sliding-window", window=window)
    starts = np.flatnonzero(visible.sum(axis=1) == 1)
    chunk = int(starts[1] - starts[0]) if len(starts) > 1 else length
    if np.array_equal(visible, causal & (query // chunk == key // chunk)):
        return Mask(kind="chunked", chunk=chunk)
    return Mask(kind="other")


def _has_bias(pattern: AttentionPattern) -> bool:
    """Whether equal scores give unequal weights to the visible keys of a query."""
    if pattern.uniform_weights is None:
        return False
    weights = pattern.uniform_weights.reshape(-1, *pattern.uniform_weights.shape[-2:])
    largest = weights.max(axis=-1)
    smallest = np.where(weights > MIN_WEIGHT, weights, np.inf).min(axis=-1)
    return bool((smallest < (1 - 1e-3) * largest).any())
