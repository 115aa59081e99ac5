"""What kind of mask an attention has, read off the weights that it was seen to give."""

from __future__ import annotations

import numpy as np

from kvsurgeon.anatomy.facts import Mask
from kvsurgeon.proof.attention_pattern import SEEN
from kvsurgeon.proof.causality import AttentionPattern


def read_mask(seen: AttentionPattern) -> Mask:
    """Return the mask that lets queries see what they were seen to see."""
    weights = seen.weights if seen.flat is None else seen.flat
    allowed = (weights != 0).reshape(-1, *weights.shape[-2:]).any(axis=0)  # a steep bias may leave next to nothing
    padding = seen.padded is not None and bool((np.abs(seen.padded[..., 2:, :2]) <= SEEN).all())
    kind, window, chunk = _kind(allowed)
    return Mask(kind=kind, window=window, chunk=chunk, padding=padding, bias=_is_biased(seen))  # type: ignore[arg-type]


def _kind(allowed: np.ndarray) -> tuple[str, int | None, int | None]:
    length = allowed.shape[-1]
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    causal = key <= query
    if np.array_equal(allowed, causal):
        return "causal", None, None
    window = int(allowed[-1].sum())
    if np.array_equal(allowed, causal & (query - key < window)):
        return "window", window, None
    starts = np.flatnonzero(allowed.sum(axis=1) == 1)
    chunk = int(starts[1] - starts[0]) if len(starts) > 1 else length
    if np.array_equal(allowed, causal & (query // chunk == key // chunk)):
        return "chunk", None, chunk
    return "other", None, None


def _is_biased(seen: AttentionPattern) -> bool:
    """Whether equal scores give unequal weights to the keys that a query sees."""
    if seen.flat is None:
        return False
    weights = seen.flat.reshape(-1, *seen.flat.shape[-2:])
    largest = weights.max(axis=-1)
    smallest = np.where(weights > SEEN, weights, np.inf).min(axis=-1)
    return bool((smallest < (1 - 1e-3) * largest).any())
