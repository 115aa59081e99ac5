"""Token data as [batch, sequence, heads * head_dim], the layout of projections and of fused attention operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint, cache_point_of
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.fusion.context import FusionContext, Sizes
from kvsurgeon.fusion.score_path import MOVES
from kvsurgeon.graph.query import chain
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.ops.table import has_trait
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import Dimension

_SWAP = (0, 2, 1, 3)  # [batch, heads, sequence, head_dim] to [batch, sequence, heads, head_dim] and back


class HiddenLayout:
    """Converts tensors to the hidden layout and back with as few operators as possible."""

    def __init__(self, context: FusionContext) -> None:
        self.context = context
        self.editor = context.editor
        self.labels = IndexTrace(context.flow)

    def convert(self, point: CachePoint) -> ir.Value:
        """Return a tensor in the hidden layout; an existing tensor in that layout is used if the graph has one."""
        hidden = self._shapes(point)[2]
        by_token: list[ir.Value] = []
        for value in self._sources(point.value):
            if not self._same_order(value, point.value):
                break
            if self._is_by_token(value):
                by_token.append(value)
            elif not by_token:
                point = cache_point_of(self.context.flow, value) or point
        if by_token:
            sizes = [self.context.token_sizes(value) for value in by_token]
            place = sizes.index(hidden) if hidden in sizes else 0
            return self._reshape(by_token[place], sizes[place], hidden, point.dtype)
        parts, heads, hidden = self._shapes(point)
        value = self._reshape(point.value, self.context.token_sizes(point.value), parts, point.dtype)
        ordered = tuple(parts[place] for place in point.order)
        order = point.order
        if ordered != heads:
            value = self._reshape(self._transpose(value, order, point.dtype), ordered, heads, point.dtype)
            order = tuple(range(4))
        value = self._transpose(value, [order[place] for place in _SWAP], point.dtype)
        return self._reshape(value, [heads[place] for place in _SWAP], hidden, point.dtype)

    def replace(self, point: CachePoint, hidden: ir.Value) -> None:
        """Replace a tensor by one in the hidden layout; layout operators that convert it become dead code."""
        same = (one for one in self._results(point.value) if self._is_by_token(one))
        value = next((one for one in same if self._same_order(point.value, one)), None)
        if value is None:
            self.editor.replace(point.value, self._restore(hidden, point))
        else:
            made = self._reshape(hidden, self._shapes(point)[2], self.context.token_sizes(value), point.dtype)
            self.editor.replace(value, made)

    def _restore(self, hidden: ir.Value, point: CachePoint) -> ir.Value:
        """Convert from the hidden layout to that of a tensor."""
        parts, heads, before = self._shapes(point)
        ordered = tuple(parts[place] for place in point.order)
        value = self._reshape(hidden, before, [heads[place] for place in _SWAP], point.dtype)
        value = self._reshape(self._transpose(value, _SWAP, point.dtype), heads, ordered, point.dtype)
        back = [point.order.index(place) for place in range(len(parts))]
        value = self._transpose(value, back, point.dtype)
        return self._reshape(value, parts, self.context.token_sizes(point.value), point.dtype)

    def _shapes(self, point: CachePoint) -> tuple[Sizes, Sizes, Sizes]:
        """Return the shape of the parts, [batch, heads, sequence, head_dim], and [batch, sequence, hidden size]."""
        sequence = self.context.sequence
        parts = tuple(sequence if size is None else size for size in point.parts)
        heads = (point.batch, point.heads, sequence, point.head_dim)
        return parts, heads, (point.batch, sequence, point.heads * point.head_dim)

    def _reshape(
        self, value: ir.Value, before: Sequence[Dimension], after: Sequence[Dimension], dtype: ir.DataType
    ) -> ir.Value:
        if tuple(before) == tuple(after):
            return value
        target, name = self.context.lengths.reshape_target(after, before), f"{value.name}.rows"
        return self.editor.node("Reshape", [value, target], name=name, dtype=dtype, shape=dim_names(after))

    def _transpose(self, value: ir.Value, order: Sequence[int], dtype: ir.DataType) -> ir.Value:
        if list(order) == list(range(len(order))):
            return value
        return self.editor.node("Transpose", [value], {"perm": list(order)}, name=f"{value.name}.moved", dtype=dtype)

    def _sources(self, value: ir.Value) -> Iterator[ir.Value]:
        """Yield a tensor and those that it is made of by layout operators alone, the nearest first."""
        return chain(value, lambda node: self.context.before[node][0] if self._is_layout(node) else None)

    def _results(self, value: ir.Value) -> Iterator[ir.Value]:
        """Yield the tensors that layout operators alone make of a tensor, and the tensor, the farthest first."""
        found = [value]
        while not value.is_graph_output() and len(users := list(value.uses())) == 1:
            node, index = users[0]
            if index or not self._is_layout(node):
                break
            value = node.outputs[0]
            found.append(value)
        yield from reversed([one for one in found if not one.is_graph_output()])

    def _is_layout(self, node: ir.Node) -> bool:
        return has_trait(node, *MOVES) and node in self.context.before and self.labels.rearranges(node)

    def _is_by_token(self, value: ir.Value) -> bool:
        """Return whether a tensor is [batch, sequence, ...]."""
        found = cache_point_of(self.context.flow, value)
        if found is None:
            return False
        sequence, batch = found.parts.index(None), found.order[0] if found.batch != 1 else None
        before = enumerate(found.parts[:sequence])
        return (batch is None or batch < sequence) and all(size == 1 or place == batch for place, size in before)

    def _same_order(self, source: ir.Value, value: ir.Value) -> bool:
        """Return whether two tensors have the features of each token in the same order."""
        try:
            places = self.labels.feature_indices(source, value).reshape(-1)
        except UnsupportedError:
            return False
        return np.array_equal(places, np.arange(places.size))
