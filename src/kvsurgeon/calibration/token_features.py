"""Arrays of token data as `[batch, sequence, features]`, whatever the layout of the tensor."""

from __future__ import annotations

import numpy as np

from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.heads.layout import Layout


def to_features(array: np.ndarray, layout: Layout, batch: int, length: int) -> np.ndarray:
    """Return token data as `[batch, sequence, features]`."""
    parts = array.reshape(_sizes(layout, batch, length))
    return np.asarray(parts.transpose(_order(layout)).reshape(batch, length, layout.width))


def from_features(features: np.ndarray, layout: Layout) -> np.ndarray:
    """Return `[batch, sequence, features]` in the layout of a tensor."""
    batch, length, _ = features.shape
    sizes, order = _sizes(layout, batch, length), _order(layout)
    parts = features.reshape([sizes[place] for place in order]).transpose(np.argsort(order))
    return np.asarray(parts.reshape([int(at_length(size, length, batch)) for size in layout.shape]))


def _order(layout: Layout) -> list[int]:
    first = [place for place in (layout.batch, layout.sequence) if place is not None]
    return [*first, *layout.feature_places]


def _sizes(layout: Layout, batch: int, length: int) -> list[int]:
    return [int(at_length(size, length, batch)) for size in layout.parts]
