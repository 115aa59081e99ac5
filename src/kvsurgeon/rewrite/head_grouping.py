"""Head grouping: queries that share a key/value head are rows of one product with it, read from the cache directly.

An export repeats the heads of keys and values for the queries that share them, scales them and transposes them: at
every step, for all past tokens. Instead, the queries of a group become rows of one product, and only new queries are
moved: [batch, heads * repeats, rows, head_dim] is [batch, heads, repeats * rows, head_dim] without a copy.
Source: Ainslie et al., "GQA", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_flow import FusedAttention
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait
from kvsurgeon.resizing.token_data import TokenRewriter
from kvsurgeon.rewrite.cache_layouts import CANONICAL, Order, from_cache, reordered
from kvsurgeon.rewrite.layout_trace import HEAD_DIM, SEQUENCE, LayoutTrace, trace_layout
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Length

_QUERY_TRANSPOSES = ("transA", "transBatchA", "transBatchB")  # attributes of FusedMatMul
_TRANSPOSED_KEYS: Order = (0, 1, 3, 2)


class HeadGrouping:
    """Connects attention products to the cache, without copies of it if possible."""

    def __init__(self, tokens: TokenRewriter) -> None:
        self.flow = tokens.flow
        self.tokens = tokens
        self.editor = tokens.editor
        self.lengths = tokens.lengths
        self._caches: dict[ir.Value, tuple[ir.Value, Order]] = {}

    def add_cache(self, point: CachePoint, rows: ir.Value, order: Order) -> None:
        """Set the cached rows of a tensor, whose axes are in an order: its consumers read them."""
        shape = self.flow.shapes[point.value].shape or ()
        sizes = self.tokens.slices.sizes(shape, self.tokens.axes_at(point.value, Length.TOTAL))
        self.tokens.add_total(point.value, from_cache(self.lengths, point, rows, sizes, order))
        self._caches[point.value] = rows, order

    def regroup(self, site: AttentionSite) -> None:
        """Regroup the products of an attention site if that saves work for past tokens."""
        if site.fused is not None:
            self._share_heads(site.fused, (*site.keys, *site.values))
            return
        for operand in site.keys:
            self._regroup(operand, is_key=True)
        for operand in site.values:
            self._regroup(operand, is_key=False)

    def _share_heads(self, fused: FusedAttention, operands: Sequence[CachedOperand]) -> None:
        """Connect a fused operator to the heads before their repetition, if both keys and values are repeated."""
        if len(fused.inputs.layout) != 4:
            return
        for operand in operands:
            trace = self._trace(operand)
            if trace is None or trace.repeats == 1 or trace.scales or len(trace.axes) != 4:
                return
            if not trace.is_grouped(((SEQUENCE,), (HEAD_DIM,))):
                return
        for operand in operands:
            rows, order = self._caches[operand.cache_point.value]
            self.editor.replace_input(*operand.place, reordered(self.lengths, operand.cache_point, rows, order))

    def _trace(self, operand: CachedOperand) -> LayoutTrace | None:
        node, index = operand.place
        value = self.tokens.before[node][index]
        return None if value is None else trace_layout(self.flow, self.tokens.before, value, operand.cache_point)

    def _regroup(self, operand: CachedOperand, *, is_key: bool) -> None:
        node, index = operand.place
        value, queries = self.tokens.before[node][index], self.tokens.before[node][1 - index] if index == 1 else None
        if not _is_plain(node) or value is None or queries is None:
            return
        trace = self._trace(operand)
        if trace is None or (trace.scales and not is_key) or _is_free(trace, operand.cache_point):
            return
        is_matrix = set(trace.axes[-2:]) == {(SEQUENCE,), (HEAD_DIM,)}
        if self._have_same_heads(queries, value, trace) and is_matrix and trace.is_grouped(trace.axes[-2:]):
            self._rewire(operand, trace, queries)

    def _have_same_heads(self, queries: ir.Value, value: ir.Value, trace: LayoutTrace) -> bool:
        """Return whether both operands have the same axes before the last two, and scales fit the queries."""
        mine, theirs = self.flow.shapes[queries].shape, self.flow.shapes[value].shape
        if mine is None or theirs is None or not _same(mine[:-2], theirs[:-2]):
            return False
        return all(len(self.flow.shapes[scale].shape or ()) <= len(mine) for _, scale in trace.scales)

    def _rewire(self, operand: CachedOperand, trace: LayoutTrace, queries: ir.Value) -> None:
        """Connect a product to the cache, with the queries of each group as rows."""
        (node, index), point = operand.place, operand.cache_point
        rows, order = self._caches[point.value]
        wanted = _TRANSPOSED_KEYS if trace.axes[-1] == (SEQUENCE,) else CANONICAL
        rows = reordered(self.lengths, point, rows, order, wanted)
        query = node.inputs[1 - index]
        assert query is not None
        for operator, scale in trace.scales:
            inputs = [query, self.tokens.slices.slice_of(scale, ())]
            query = self.editor.node(operator, inputs, name=f"{queries.name}.scaled", dtype=point.dtype)
        before, result = self._sizes(queries), self._sizes(node.outputs[0])
        group = [point.batch, point.heads, dim.multiply(trace.repeats, before[-2])]
        if not _same(before, [*group, before[-1]]):
            target = self.lengths.reshape_target([*group, before[-1]], before)
            query = self.editor.node(
                "Reshape", [query, target], name=f"{query.name}.grouped", dtype=point.dtype,
                shape=dim_names([*group, before[-1]]),
            )  # fmt: skip
        self.editor.replace_input(node, 1 - index, query)
        self.editor.replace_input(node, index, rows)
        if not _same([*group, result[-1]], result):
            target = self.lengths.reshape_target(result, [*group, result[-1]])
            shapes = dim_names([*group, result[-1]]), dim_names(result)
            self.editor.append_to(node.outputs[0], "Reshape", [target], point.dtype, shapes)

    def _sizes(self, value: ir.Value) -> list[Dimension]:
        shape = self.flow.shapes[value].shape or ()
        return self.tokens.slices.sizes(shape, self.tokens.axes_at(value, Length.NEW))


def _is_plain(product: ir.Node) -> bool:
    """Return whether rows of the first operand are rows of the result, and that is no graph output."""
    is_transposed = any(product.attributes.get_int(name, 0) for name in _QUERY_TRANSPOSES)
    return has_trait(product, Trait.BATCHED_MATMUL) and not is_transposed and not product.outputs[0].is_graph_output()


def _is_free(trace: LayoutTrace, point: CachePoint) -> bool:
    """Return whether nothing is computed or copied: runtimes fuse a final swap of two axes into the product."""
    if trace.repeats > 1 or trace.scales or point.layout_cost == 2:
        return False
    return not any(_copies(step, is_last=step is trace.steps[-1]) for step in trace.steps)


def _copies(step: ir.Node, *, is_last: bool) -> bool:
    """Return whether a step is a transposition other than a final swap of the last two axes."""
    if step.op_type != "Transpose":
        return False
    order = list(step.attributes.get_ints("perm") or ())
    swap = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
    return not is_last or order != swap


def _same(mine: Sequence[Dimension], theirs: Sequence[Dimension]) -> bool:
    return len(mine) == len(theirs) and all(dim.is_equal(one, other) for one, other in zip(mine, theirs, strict=True))
