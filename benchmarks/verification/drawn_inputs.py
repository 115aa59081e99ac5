"""Inputs for models without stored ones, from token ids at random."""

from __future__ import annotations

import numpy as np
import onnx

FEW = 60  # token ids, if the vocabulary is unknown


def vocabulary_size(model: onnx.ModelProto) -> int:
    """Return the number of rows of the smallest table that an input picks from."""
    inputs = {value.name for value in model.graph.input}
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    tables = [node.input[0] for node in model.graph.node if node.op_type == "Gather" and node.input[1] in inputs]
    return min((int(rows[name]) for name in tables if name in rows), default=FEW)


def random_ids(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Return token ids [batch, length], the same ones each time."""
    return np.random.default_rng(batch).integers(0, vocabulary, (batch, length))


def input_for(name: str, ids: np.ndarray) -> np.ndarray:
    """Return a mask or positions, if an input's name says so, or else the token ids; all of their shape."""
    if "mask" in name:
        return np.ones(ids.shape)
    if "position" in name:
        return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return ids
