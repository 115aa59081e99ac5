"""The rotary embedding of queries and keys, for an attention operator that rotates them itself.

What the graph computes between two values is run on chosen inputs and compared with a rotation, so that its form
does not matter: halves or pairs of features, concatenations, scatters, complex products, or a fused operator.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint, cache_point_of
from kvsurgeon.analysis.probe_inputs import Rows, at_length, position_input, run_dtype
from kvsurgeon.analysis.subgraph_runner import SubgraphRunner
from kvsurgeon.analysis.token_data import is_token, token_inputs
from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.input_roles import find_positions
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

LENGTH = 7  # tokens on which a rotation is checked
LARGEST = 1 << 27  # elements of keys for the longest text; those of longer ones are rotated in the graph
TOLERANCE = {"float16": 5e-3}  # of elements near 1; 1e-5 for other types, which are run as float32

_STEPS = 40  # values between a rotated tensor and its source
_TABLE_NODES = 61  # at most so many nodes compute the angles of positions


@dataclass(frozen=True, kw_only=True)
class OperatorRotary:
    """A rotary embedding whose angles depend on the place of a token alone.

    Attributes:
        query: Queries before the rotation, as [batch, heads, sequence, head_dim].
        key: Keys before the rotation, as [batch, kv_heads, sequence, head_dim].
        cos: Cosines, [positions, rotary_dim / 2].
        sin: Sines, [positions, rotary_dim / 2].
        interleaved: Whether neighboring features are a pair; otherwise the two halves are.
    """

    query: CachePoint
    key: CachePoint
    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool


@dataclass(kw_only=True)
class RotaryMatcher:
    """Matches rotary embeddings of attention layers; equal tables are one array.

    Attributes:
        flow: The token flow of the graph.
        same: For each context value that is computed again, its first computation.
        positions: Number of rows of the tables, the longest text in tokens.
        by_lengths: Whether masks and position inputs only say that the tokens of each row come first and count up.
    """

    flow: TokenFlow
    same: Mapping[ir.Value, ir.Value]
    positions: int
    by_lengths: bool
    _tables: dict[Hashable, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def match(self, query_point: CachePoint, key_point: CachePoint) -> OperatorRotary | None:
        """Return the rotary embedding of queries and keys; None if they are not rotated by the same angles."""
        key = self._rotation(key_point)
        query = None if key is None else self._rotation(query_point)
        if key is None or query is None or (key.width, key.interleaved) != (query.width, query.interleaved):
            return None
        tables, others = self._table(key), self._table(query)
        if tables is None or others is None:
            return None
        if not all(one is other or np.array_equal(one, other) for one, other in zip(tables, others, strict=True)):
            return None
        cos, sin = tables
        return OperatorRotary(query=query.source, key=key.source, cos=cos, sin=sin, interleaved=key.interleaved)

    def _rotation(self, point: CachePoint) -> _Rotation | None:
        """Return the rotation that a tensor is the result of, from the nearest tensor that it is a rotation of."""
        for value in _single_sources(self.flow, point.value):
            found = cache_point_of(self.flow, value, point.heads)
            if found is None or (found.heads, found.head_dim) != (point.heads, point.head_dim):
                continue
            try:
                rotation = self._between(found, point)
            except UnsupportedError:
                return None
            if rotation is not None:
                return rotation
        return None

    def _between(self, source: CachePoint, result: CachePoint) -> _Rotation | None:
        positions = find_positions(self.flow.inputs)
        probed = [source.value, *(given.value for given in positions)]
        runner = SubgraphRunner(self.flow, [result.value], probed=probed)
        positions = [given for given in positions if given.value.name in runner.feeds]
        if (runner.masks or positions) and not self.by_lengths:
            return None
        for given in positions:
            runner.inputs.give(given.value.name or "", partial(position_input, given))
        blank = _Rotation(runner=runner, source=source, result=result, width=source.head_dim, interleaved=False)
        shape = (1, source.heads, LENGTH, source.head_dim)
        before = np.random.default_rng(0).standard_normal(shape).astype(blank.dtype)
        after = blank.run(before)
        atol = TOLERANCE.get(blank.dtype.name, 1e-5)
        changed = np.flatnonzero((np.abs(after - before) > atol).any(axis=(0, 1, 2)))
        if not changed.size:
            return None
        for width in dict.fromkeys((source.head_dim, (int(changed[-1]) // 2 + 1) * 2)):
            for interleaved in (False, True):
                rotation = replace(blank, width=width, interleaved=interleaved)
                start = rotation.tables(LENGTH)
                if np.allclose(rotation.expected(before, *start), after, rtol=0, atol=atol):
                    return replace(rotation, start=start)
        return None

    def _table(self, rotation: _Rotation) -> tuple[np.ndarray, np.ndarray] | None:
        """Return cosines and sines of all positions, the same arrays if they come from the same values; None if large.

        Those of the queries mostly are those of the keys, which have fewer heads.
        """
        angles = [
            self.same.get(value, value)
            for node in rotation.runner.nodes
            if is_token(self.flow, node.outputs[0])
            for value in node.inputs
            if value is not None and (not is_token(self.flow, value) or _is_angle(self.flow, value))
            if value in self.flow.kinds or not _is_integer(self.flow, value)  # no shapes, axes or bounds
        ]
        first_rows = (table.tobytes() for table in rotation.start)
        key = frozenset(angles), rotation.width, rotation.interleaved, *first_rows
        if key not in self._tables:
            if rotation.source.heads * rotation.source.head_dim * self.positions > LARGEST:
                return None
            self._tables[key] = rotation.tables(self.positions)
        return self._tables[key]


@dataclass(frozen=True, kw_only=True)
class _Rotation:
    """A part of a graph that may be a rotation.

    Attributes:
        runner: Runs the part.
        source: The tensor that is rotated.
        result: The rotated tensor.
        width: Number of features that are rotated.
        interleaved: Whether neighboring features are a pair.
        start: The first rows of the tables of cosines and sines.
    """

    runner: SubgraphRunner
    source: CachePoint
    result: CachePoint
    width: int
    interleaved: bool
    start: tuple[np.ndarray, ...] = ()

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type that the part is run in."""
        return run_dtype(self.source.dtype).numpy()

    def run(self, given: np.ndarray) -> np.ndarray:
        """Return the result for a source, both [1, heads, sequence, head_dim]."""
        length, point = given.shape[2], self.source
        sizes = [length if size is None else int(at_length(size, length, 1)) for size in point.parts]
        parts = given.reshape([sizes[place] for place in point.order]).transpose(np.argsort(point.order))
        flow = self.runner.flow
        shape = Rows(0, length, length, 1).sizes(flow.shapes[point.value].shape or (), flow.axes.get(point.value, ()))
        array = parts.reshape(shape).astype(self.dtype)
        self.runner.inputs.give(point.value.name or "", lambda _rows: array)
        found = self.runner.run(length, batch=1)[0]
        result = self.result
        sizes = [length if size is None else int(at_length(size, length, 1)) for size in result.parts]
        return np.asarray(found.reshape(sizes).transpose(result.order).reshape(1, result.heads, length, -1))

    def tables(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the cosines and sines that a rotation by halves or pairs has, [length, width / 2]."""
        given = np.zeros((1, self.source.heads, length, self.source.head_dim))
        first, second = self._pairs()
        given[..., first] = 1
        found = self.run(given)[0, 0]
        return found[:, first].astype(np.float32), found[:, second].astype(np.float32)

    def expected(self, given: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Return the rotation of a tensor, [1, heads, sequence, head_dim]."""
        first, second = self._pairs()
        result = given.copy()
        result[..., first] = given[..., first] * cos - given[..., second] * sin
        result[..., second] = given[..., second] * cos + given[..., first] * sin
        return result

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first and the second feature of each pair."""
        half = np.arange(self.width // 2)
        return (2 * half, 2 * half + 1) if self.interleaved else (half, half + self.width // 2)


def _single_sources(flow: TokenFlow, value: ir.Value) -> Iterator[ir.Value]:
    """Yield the tensors that a tensor is computed from with angles of positions and nothing else, the nearest first."""
    boundary = {value}
    for _ in range(_STEPS):
        latest = max(boundary, key=flow.position)
        node = latest.producer()
        if node is None or has_trait(node, Trait.PROJECTION):
            return
        boundary.remove(latest)
        boundary |= {one for one in token_inputs(flow, node) if not _is_angle(flow, one)}
        if len(boundary) == 1:
            yield next(iter(boundary))
        if not boundary:
            return


def _is_integer(flow: TokenFlow, value: ir.Value) -> bool:
    dtype = flow.shapes[value].dtype
    return dtype is not None and dtype.is_integer()


def _is_angle(flow: TokenFlow, value: ir.Value) -> bool:
    """Return whether token data is computed by a few nodes from inputs of positions, or is one."""
    positions = {given.value for given in find_positions(flow.inputs)}
    found: dict[ir.Value, None] = {value: None}
    waiting = [value]
    while waiting and len(found) <= _TABLE_NODES:
        one = waiting.pop()
        node = one.producer()
        if node is None and one not in positions:
            return False
        more = [each for each in ([] if node is None else token_inputs(flow, node)) if each not in found]
        found |= dict.fromkeys(more)
        waiting += more
    return not waiting
