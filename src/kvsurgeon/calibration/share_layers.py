"""Fit the projections of layers to the keys and values of another layer, by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.analysis import Analysis
from kvsurgeon.calibration.merge_heads import Changes, Reasons, apply_changes
from kvsurgeon.calibration.moments import SecondMoment
from kvsurgeon.calibration.readers import OutputProjection, QueryProjection, complex_factor
from kvsurgeon.calibration.shared_heads import SharedHeads, find_shared_heads
from kvsurgeon.calibration.token_features import token_features
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.heads.index_trace import IndexTrace

_DAMPING = 1e-6  # of the mean second moment

Pair = tuple[SharedHeads, SharedHeads, int]  # what a layer reads, what it is to read, and the index of the layer


def read_other_layers(analysis: Analysis, owners: Sequence[int], text: Path, folder: Path | None) -> tuple[str, ...]:
    """Change queries and output projections so that layers can read the keys and values of their owners.

    Keys of a layer are approximated by those of its owner, each pair that a rotary embedding turns times a complex
    number; values by a linear map. Both are multiplied into the projections of the layer.

    Args:
        analysis: The model, whose weights are replaced.
        owners: For each layer the one whose keys and values it is to read.
        text: The text, on whose first half the model is run.
        folder: Folder of the model.

    Returns:
        Notes about what is read as it is.

    Raises:
        UnsupportedError: The weights cannot be found.
    """
    trace = IndexTrace(analysis.flow)
    of_layer = {layer: one for one in find_shared_heads(analysis) for layer in one.layers}
    pairs = [
        (of_layer[layer], of_layer[owner], of_layer[layer].layers.index(layer))
        for layer, owner in enumerate(owners)
        if of_layer[layer] is not of_layer[owner] and _is_alike(of_layer[layer], of_layer[owner])
    ]
    moments = _measure(analysis, pairs, text, folder)
    changes: Changes = []
    others = Reasons()
    for (one, owner, place), (keys, values) in zip(pairs, moments, strict=True):
        try:
            reader = QueryProjection.of(trace, one, one.queries[place])
            planes = reader.heads.planes
            matrices = {head: _key_factors(planes, moment.total) for head, moment in enumerate(keys)}
            changes.append((reader.product, reader.changed(matrices)))
        except UnsupportedError as error:
            if error.code is Code.CANNOT_AVERAGE:
                raise
            others.add("keys of other layers are read as they are", error)
        output = OutputProjection.of(trace, one, one.contexts[place])
        plain = range(owner.value_dim)
        matrices = {head: _linear_map(moment.total, plain) for head, moment in enumerate(values)}
        changes.append((output.product, output.changed(matrices)))
    apply_changes(analysis.model, changes)
    return others.notes()


def _is_alike(one: SharedHeads, other: SharedHeads) -> bool:
    return (one.kv_heads, one.head_dim, one.value_dim) == (other.kv_heads, other.head_dim, other.value_dim)


def _measure(
    analysis: Analysis, pairs: Sequence[Pair], text: Path, folder: Path | None
) -> list[tuple[list[SecondMoment], list[SecondMoment]]]:
    """Return for each pair and KV head the second moment of the owner's keys next to the layer's; then of values."""
    moments = [
        tuple([SecondMoment(2 * size) for _ in range(one.kv_heads)] for size in (one.head_dim, one.value_dim))
        for one, _, _ in pairs
    ]
    values = [value for one, owner, _ in pairs for value in (one.keys, one.values, owner.keys, owner.values)]
    for features in token_features(analysis, values, text, folder) if pairs else ():
        for (one, owner, _), (keys, others) in zip(pairs, moments, strict=True):
            _add_heads(features, keys, owner.keys, one.keys)
            _add_heads(features, others, owner.values, one.values)
    for (one, _, _), (keys, others) in zip(pairs, moments, strict=True):
        for moment in (*keys, *others):
            moment.check(one.keys.name or "")
    return [(keys, others) for keys, others in moments]


def _add_heads(
    features: Mapping[ir.Value, np.ndarray], moments: Sequence[SecondMoment], owner: ir.Value, own: ir.Value
) -> None:
    tokens, heads = len(features[own]), len(moments)
    both = np.concatenate([features[value].reshape(tokens, heads, -1) for value in (owner, own)], axis=-1)
    for head, moment in enumerate(moments):
        moment.add(both[:, head])


def _key_factors(planes: Sequence[tuple[int, ...]], moment: np.ndarray) -> np.ndarray:
    """Return the matrix that gives the keys of a layer from those of its owner with the least error.

    Raises:
        UnsupportedError: More than two features are rotated together.
    """
    size = len(moment) // 2
    matrix = np.zeros((size, size))
    if max(map(len, planes)) > 2:
        raise UnsupportedError("queries are rotated in sets of more than two features", code=Code.UNTRACEABLE_HEADS)
    for x, y in (plane for plane in planes if len(plane) == 2):
        real = moment[size + x, x] + moment[size + y, y]
        imaginary = moment[size + y, x] - moment[size + x, y]
        power = moment[x, x] + moment[y, y]
        complex_factor(matrix, x, y, complex(real, imaginary) / max(power, 1e-30))
    plain = [plane[0] for plane in planes if len(plane) == 1]
    if plain:
        matrix[np.ix_(plain, plain)] = _linear_map(moment, plain)
    return matrix


def _linear_map(moment: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """Return the matrix that gives features of a layer from the same ones of its owner with the least error."""
    own, count = np.array(features), len(moment) // 2
    power, crossed = moment[np.ix_(own, own)], moment[np.ix_(own + count, own)]
    damped = power + np.eye(len(own)) * max(_DAMPING * float(np.trace(power)) / len(own), 1e-30)
    found: np.ndarray = np.linalg.solve(damped, crossed.T).T
    return found
