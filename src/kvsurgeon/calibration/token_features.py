"""Arrays of token data as `[batch, sequence, features]`, whatever the layout of the tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.analysis.probe_inputs import at_length
from kvsurgeon.calibration.activations import activations
from kvsurgeon.heads.layout import Layout, layout_of


def token_features(
    analysis: Analysis, values: Sequence[ir.Value], text: Path, folder: Path | None
) -> Iterator[dict[ir.Value, np.ndarray]]:
    """Yield the features of some token data, `[tokens, features]` each, for each row of the first half of a text.

    Raises:
        UnsupportedError: A value has axes other than batch, sequence and features.
        RunError: onnxruntime cannot run the model.
    """
    names = {value: value.name or "" for value in values}
    layouts = {value: layout_of(analysis.flow, value) for value in names}
    for row in activations(analysis.model, list(names.values()), text, folder=folder):
        yield {
            value: to_features(row[name], layouts[value], 1, row[name].size // layouts[value].width)[0]
            for value, name in names.items()
        }


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
    """Return the sizes of the parts of an array, which may have one sequence of a fixed batch alone."""
    return [
        batch if place == layout.batch else int(at_length(size, length, batch))
        for place, size in enumerate(layout.parts)
    ]
