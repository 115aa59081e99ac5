"""What matrices of attention weights say: who looks at whom, with some of the tokens masked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvsurgeon.analysis.mask_patterns import close
from kvsurgeon.symbolic.sequence_axes import Axes

SEEN = 1e-6  # a weight above this is one that counts


def gives_to_all(weights: np.ndarray) -> np.ndarray:
    """[..., query, 1]: queries that give weight to every key, those after them too."""
    to_all: np.ndarray = (np.abs(weights) > SEEN).all(axis=-1, keepdims=True)
    to_all[..., -1, :] = False  # which has none after it
    return to_all


def blind(whole: np.ndarray, gives_to_all: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[..., query, 1]: masked queries that are left no key, so that a softmax of nothing gives weight to everything.

    A query that is not masked has an answer that is read, and no such excuse.

    Args:
        whole: [..., query, key], the weights where no key is masked by an input.
        gives_to_all: [..., query, 1]: which give weight to every key where some are masked: they were left none.
        seen: [key] of bool: which are not masked.
    """
    left_no_key = ~((np.abs(whole) > SEEN) & seen).any(axis=-1, keepdims=True)
    blind: np.ndarray = (left_no_key | gives_to_all) & ~seen[:, None]
    return blind


def peeking(weights: np.ndarray, blind: np.ndarray) -> np.ndarray:
    """[query]: those among the blind that give weight to keys after them."""
    ahead = np.triu(np.abs(np.nan_to_num(weights)), 1) > SEEN
    peeking: np.ndarray = (ahead & blind).any(axis=-1).reshape(-1, weights.shape[-2]).any(axis=0)
    return peeking


def looked_at(weights: np.ndarray) -> np.ndarray:
    """[key]: those that some query gives weight to."""
    looked_at: np.ndarray = (np.abs(weights) > SEEN).reshape(-1, weights.shape[-1]).any(axis=0)
    return looked_at


def replaced(seen: np.ndarray) -> np.ndarray:
    """[token]: places of which those of masked tokens are others than their own."""
    places = np.arange(len(seen))
    return np.where(seen, places, places + len(seen))


def same_for(seen: np.ndarray, axes: Sequence[Axes], mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> bool:
    """Whether unfolded arrays say the same of the tokens that are seen."""
    for at, one, other in zip(axes, mine, theirs, strict=True):
        for place in range(1, len(at) + 1):
            one, other = (array.take(np.flatnonzero(seen), axis=-place) for array in (one, other))
        if not close(one, other):
            return False
    return True


def ahead(weights: np.ndarray) -> float:
    """The largest weight on a key after the query."""
    future = np.triu(np.ones(weights.shape[-2:], dtype=bool), 1)
    return float(np.abs(np.where(future, np.nan_to_num(weights), 0.0)).max(initial=0.0))
