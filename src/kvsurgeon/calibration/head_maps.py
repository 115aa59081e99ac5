"""Heads as linear maps of the columns of a projection: a matrix for each position, found by running the graph.

Whichever way a rotary embedding is written, with halves, neighbors, a part of the features or complex numbers, its
matrices show which features it rotates in pairs. A norm between projection and product is not linear, which shows too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.probe_inputs import position_input, run_dtype
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import is_token
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.calibration.token_features import from_features, to_features
from kvsurgeon.dataflow.input_roles import find_positions
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.heads.layout import layout_of
from kvsurgeon.weights.mapped import mapped_elements

_LENGTHS = (512, 64, 8)  # positions of the first of these that the graph runs: slow rotations show at the last ones
_POSITIONS = np.array([0, 1, 2, 3, 7, 31, 63, 127, 511])  # whose matrices are kept
_SCALES = (1e-2, 1.0, 1e3)  # of features, at which a linear map is the same and a norm, clip or tanh is not
_ELEMENTS = 1 << 22  # of a tensor in a run
TOLERANCE = {ir.DataType.FLOAT16: 1e-2, ir.DataType.BFLOAT16: 5e-2}  # of a map, relative to its largest element
_TOLERANCE = 1e-4  # in other types


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadMap:
    """A linear map from the columns of a projection to heads, the same for each head.

    Attributes:
        columns: The columns that compute each head, `[heads, size]`, in ascending order.
        positions: Some positions.
        matrices: At each of them, `features of a head = matrix @ columns of the head`, `[positions, size, size]`.
        tolerance: Error of the matrices, relative to their largest element.
    """

    columns: np.ndarray
    positions: np.ndarray
    matrices: np.ndarray
    tolerance: float

    @property
    def planes(self) -> tuple[tuple[int, ...], ...]:
        """The features that are mixed with each other at some position, such as the pairs of a rotary embedding."""
        size = self.matrices.shape[1]
        used = (self.matrices != 0).any(axis=0)  # [features, columns]
        joined = used @ used.T  # features that share a column
        for _ in range(size.bit_length()):
            joined = joined @ joined
        return tuple(dict.fromkeys(tuple(np.flatnonzero(row).tolist()) for row in joined))

    def on_columns(self, matrix: np.ndarray) -> np.ndarray:
        """Return what a linear change of a head's features is on its columns: `m @ columns` becomes `change @ m @ ...`.

        Raises:
            UnsupportedError: It depends on the position.
        """
        first: np.ndarray = np.linalg.inv(self.matrices[0]) @ matrix @ self.matrices[0]
        error = np.abs(self.matrices @ first - matrix @ self.matrices).max()
        if not error <= self.tolerance * max(float(np.abs(matrix).max()), 1e-30) * float(np.abs(self.matrices).max()):
            raise UnsupportedError(
                "a change of these heads depends on the position", code=Code.UNTRACEABLE_HEADS,
                expected="a rotation of pairs of features", found=f"an error of {error:.1e}",
            )  # fmt: skip
        return first


def head_columns(flow: TokenFlow, source: ir.Value, value: ir.Value, heads: int) -> np.ndarray:
    """Return the features of `source` that compute each head of `value`, `[heads, size]`, in ascending order.

    Raises:
        UnsupportedError: Heads have different numbers of them, or share some.
    """
    response = _Response(flow, source, value, alone=False)
    base = np.random.default_rng(0).standard_normal((1, 1, response.width)).astype(np.float32)
    (before,) = response.of_rows(base, 2)
    parts = [np.asarray(found != before).any(axis=1) for found in response.of_basis(base)]
    used = np.concatenate(parts)  # [columns, features]
    by_head = np.asarray(used.reshape(len(used), heads, -1).any(axis=-1))
    size = used.shape[1] // heads
    if not (by_head.sum(axis=0) == size).all() or by_head.sum(axis=1).max(initial=0) > 1:
        raise UnsupportedError(
            "heads are not computed from separate columns", code=Code.UNTRACEABLE_HEADS, at=value.name,
            expected=f"{size} columns of each head", found=", ".join(map(str, by_head.sum(axis=0))),
        )  # fmt: skip
    return np.array([np.flatnonzero(by_head[:, head]) for head in range(heads)])


def head_map(flow: TokenFlow, source: ir.Value, value: ir.Value, columns: np.ndarray) -> HeadMap:
    """Return the map from features of `source` to the heads of `value`.

    Args:
        flow: The token flow of the graph.
        source: Features of a projection.
        value: The heads.
        columns: The features that compute each head; see `head_columns`.

    Raises:
        UnsupportedError: The map is not linear, or not the same for each head.
    """
    response = _Response(flow, source, value)
    heads, size = columns.shape
    unit = np.zeros((size, 1, response.width), dtype=np.float32)
    for column in range(size):
        unit[column, 0, columns[:, column]] = 1
    length = response.longest()
    positions = _POSITIONS[length > _POSITIONS]
    parts = [found[:, positions] for found in response.of_rows(unit, length)]
    found = np.concatenate(parts).reshape(size, len(positions), heads, size)  # [columns, positions, heads, features]
    matrices = found[:, :, 0].transpose(1, 2, 0).astype(np.float64)
    tolerance = TOLERANCE.get(response.dtype, _TOLERANCE)
    largest = float(np.abs(matrices).max())
    if not np.isfinite(found).all():
        raise _not_linear(value, "an overflow")
    if not np.abs(found - found[:, :, :1]).max() <= tolerance * largest or np.linalg.cond(matrices[0]) > 1e6:
        raise _not_linear(value, "another map for each head")
    result = HeadMap(columns=columns, positions=positions, matrices=matrices, tolerance=tolerance)
    _check_linear(response, result, value)
    return result


def feature_places(flow: TokenFlow, source: ir.Value, value: ir.Value) -> np.ndarray:
    """Return for each feature of `source` the feature of `value` that it is.

    Raises:
        UnsupportedError: Features are changed in between.
    """
    response = _Response(flow, source, value)
    found = np.concatenate([part.astype(np.float64) for part in response.of_basis()])  # [features, positions, features]
    is_place = ((found == 0) | (found == 1)).all() and (found.sum(axis=-1) == 1).all()
    places: np.ndarray = found[:, 0].argmax(axis=-1)
    if not is_place or len(np.unique(places)) < len(places) or not (found == found[:, :1]).all():
        raise _not_linear(value, "features that are changed, not only moved")
    rows = np.random.default_rng(0).standard_normal((1, 1, response.width)).astype(np.float32) * 100
    (moved,) = response.of_rows(rows, 2)
    if not (moved[..., places] == rows.astype(moved.dtype)).all():
        raise _not_linear(value, "features that are changed, not only moved")
    return places


def _check_linear(response: _Response, found: HeadMap, value: ir.Value) -> None:
    """Check that the matrices give what the graph computes of any features, small or large."""
    random = np.random.default_rng(0)
    length, (heads, size) = response.runnable(int(found.positions[-1]) + 1), found.columns.shape
    for scale in _SCALES:
        rows = (random.standard_normal((1, length, response.width)) * scale).astype(response.run_dtype)
        actual = next(response.of_rows(rows, length))[0, found.positions]
        columns = rows[0][found.positions][:, found.columns].astype(np.float64)  # [positions, heads, columns]
        expected = np.einsum("tfc,thc->thf", found.matrices, columns)
        error = np.abs(actual.reshape(-1, heads, size) - expected).max()
        if not error <= found.tolerance * float(np.abs(expected).max()):
            raise _not_linear(value, f"an error of {error:.1e} for features of size {scale:g}")


def _not_linear(value: ir.Value, found: str) -> UnsupportedError:
    return UnsupportedError(
        "features are not a linear map of the projection", code=Code.UNTRACEABLE_HEADS, at=value.name, found=found,
        expected="a rotary embedding or nothing in between, and no norm",
    )  # fmt: skip


class _Response:
    """Computes one value of a graph from given features of another one.

    Args:
        flow: The token flow of the graph.
        source: The features.
        value: What is computed.
        alone: Whether to check that it depends on no other features; otherwise these are synthetic.
    """

    def __init__(self, flow: TokenFlow, source: ir.Value, value: ir.Value, *, alone: bool = True) -> None:
        self._before, self._after = layout_of(flow, source), layout_of(flow, value)
        self._source, self._value, self._flow = source, value, flow
        self.width = self._before.width
        self.dtype = flow.shapes[source].dtype or ir.DataType.FLOAT
        self.run_dtype = run_dtype(self.dtype).numpy()
        self._runner = None
        if source is not value:
            positions = {given.value: given for given in find_positions(flow.inputs)}
            self._runner = SubgraphRunner(flow, [value], probed=[source], given=positions)
            for one, given in positions.items():
                if one.name in self._runner.feeds:  # it is read
                    self._runner.inputs.give(one.name or "", partial(position_input, given))
            self._give_weights(self._runner, positions, alone=alone)
        self._batch = flow.batch if isinstance(flow.batch, int) else None  # the only one that runs

    def _give_weights(self, runner: SubgraphRunner, positions: Collection[ir.Value], *, alone: bool) -> None:
        """Feed the weights themselves, and check that nothing else of a token is read."""
        for value in {value for node in runner.nodes for value in node.inputs if value is not None}:
            if value.name not in runner.feeds or value is self._source:
                continue
            tensor = constant_tensor(value)
            if tensor is not None and is_weight(tensor):
                array = np.asarray(mapped_elements(tensor))
                array = array.astype(np.float32) if tensor.dtype is ir.DataType.BFLOAT16 else array
                runner.inputs.give(value.name or "", lambda _rows, array=array: array)  # type: ignore[misc]
            elif alone and is_token(self._flow, value) and value not in positions:
                raise _not_linear(self._value, f"`{value.name}`, which depends on the token")
        if alone and any(given.is_token for given in runner.masks):
            raise _not_linear(self._value, "a value that depends on the token")

    def of_basis(self, base: float | np.ndarray = 0.0) -> Iterator[np.ndarray]:
        """Yield the response to the base plus each feature, at two positions: `[some features, positions, ...]`."""
        yield from self.of_rows(np.eye(self.width, dtype=np.float32)[:, None] + base, 2)

    def of_rows(self, rows: np.ndarray, length: int) -> Iterator[np.ndarray]:
        """Yield the response to features, `[rows, positions or 1, features]`, at the first positions."""
        length = self.runnable(length)
        start = 0
        while start < len(rows):
            step = self._batch or max(1, _ELEMENTS // (length * max(self.width, self._after.width)))
            part = rows[start : start + step]
            count = len(part)
            part = np.broadcast_to(part, (count, length, self.width))
            if self._batch is not None and count < self._batch:
                padding = np.zeros((self._batch - count, length, self.width), part.dtype)
                part = np.concatenate([part, padding])
            try:
                found = self._run(part.astype(self.run_dtype))[:count]
            except UnsupportedError:
                if self._batch is not None or count == 1:
                    raise
                self._batch = 1  # some exports are right for one row only
                continue
            yield found
            start += count

    def longest(self) -> int:
        """Return a number of positions that the graph runs.

        Raises:
            UnsupportedError: It runs none.
        """
        *longer, shortest = _LENGTHS
        for length in longer:
            with suppress(UnsupportedError):
                next(self.of_rows(np.zeros((1, 1, self.width), np.float32), length))
                return self.runnable(length)
        return self.runnable(shortest)

    def runnable(self, wanted: int) -> int:
        """Return a number of positions, or the only one that the graph has."""
        return self._flow.length if isinstance(self._flow.length, int) else wanted

    def _run(self, features: np.ndarray) -> np.ndarray:
        batch, length, _ = features.shape
        if self._runner is None:
            return features
        array = from_features(features, self._before)
        self._runner.inputs.give(self._source.name or "", lambda _rows: array)
        (found,) = self._runner.run(length, batch=batch)
        return to_features(found, self._after, batch, length)
