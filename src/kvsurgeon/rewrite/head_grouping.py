"""Head grouping: queries that share a key/value head are rows of one product with it, read from the cache directly.

An export repeats the heads of keys and values for the queries that share them, scales them and transposes them: at
every step, for all past tokens. Instead, the queries of a group become rows of one product, and only new queries are
moved: [batch, heads * repeats, rows, head_dim] is [batch, heads, repeats * rows, head_dim] without a copy.
Source: Ainslie et al., "GQA", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_flow import FusedAttention, Place
from kvsurgeon.graph.editor import Editor
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import contraction_of, has_trait
from kvsurgeon.resizing.token_data import TokenRewriter
from kvsurgeon.rewrite.cache_layouts import CANONICAL, Order, add_cached_rows, reordered
from kvsurgeon.rewrite.grouped_product import GroupedProduct, group_product
from kvsurgeon.rewrite.layout_trace import HEAD_DIM, SEQUENCE, LayoutTrace, trace_layout
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Length

_QUERY_TRANSPOSES = ("transA", "transBatchA", "transBatchB")  # attributes of FusedMatMul
_TRANSPOSED: Order = (0, 1, 3, 2)

# Operator, further inputs, attributes, and the shape of the result.
_Step = tuple[str, list[ir.Value], Mapping[str, list[int]] | None, list[Dimension]]


class HeadGrouping:
    """Connects attention products to the cache, without copies of it if possible."""

    def __init__(self, tokens: TokenRewriter) -> None:
        self.flow = tokens.flow
        self.tokens = tokens
        self.editor = tokens.editor
        self.lengths = tokens.lengths
        self._caches: dict[ir.Value, tuple[ir.Value, Order]] = {}
        self._done: set[Place] = set()  # a layer may read the scores or the weights of another

    def add_cache(self, point: CachePoint, rows: ir.Value, order: Order) -> None:
        """Set the cached rows of a tensor, whose axes are in an order: its consumers read them."""
        add_cached_rows(self.tokens, point, rows, order)
        self._caches[point.value] = rows, order

    def regroup(self, site: AttentionSite) -> None:
        """Regroup the products of an attention site if that saves work for past tokens."""
        if site.fused is not None:
            self._share_heads(site.fused, (*site.keys, *site.values))
            return
        for operand in (*site.keys, *site.values):
            if operand.place not in self._done:
                self._done.add(operand.place)
                self._regroup(operand, is_key=operand in site.keys)

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
        (node, index), point = operand.place, operand.cache_point
        before = self.tokens.before[node]
        found = contraction_of(self.flow.shapes.call(node, before)) if self._is_plain(node, index) else None
        trace = None if found is None else self._trace(operand)
        if found is None or trace is None or (trace.scales and not is_key) or _is_free(node, trace, point):
            return
        queries = before[found.left if index == found.right else found.right]
        if queries is None or any(self._rank(scale) > self._rank(queries) for _, scale in trace.scales):
            return
        grouped = group_product(found, index, trace, self._sizes(queries), self._sizes(node.outputs[0]))
        if grouped is not None:
            self._rewire(operand, trace, queries, grouped)

    def _is_plain(self, product: ir.Node, index: int) -> bool:
        """Return whether a product has one scale for all elements of an operand, and is no graph output."""
        if not has_trait(product, Trait.BATCHED_MATMUL, Trait.EINSUM) or product.outputs[0].is_graph_output():
            return False
        before = self.tokens.before[product]
        scales = [self.flow.shapes[one].shape for one in before if one is not None and one not in self.flow.axes]
        are_single = all(shape is not None and dim.product(shape) == 1 for shape in scales)
        return len(before) == 2 or (index > 0 and are_single)

    def _rewire(self, operand: CachedOperand, trace: LayoutTrace, queries: ir.Value, grouped: GroupedProduct) -> None:
        """Connect a product to the cache, with the queries of each group as rows."""
        (node, index), point = operand.place, operand.cache_point
        rows, order = self._caches[point.value]
        query, output = node.inputs[0 if index else 1], node.outputs[0]
        assert query is not None
        wanted = CANONICAL if grouped.sums_tokens != _as_matmul(self.editor, node, index) else _TRANSPOSED
        rows = reordered(self.lengths, point, rows, order, wanted)
        for operator, scale in trace.scales:
            inputs = [query, self.tokens.slices.slice_of(scale, ())]
            query = self.editor.node(operator, inputs, name=f"{queries.name}.scaled", dtype=point.dtype)
        self.editor.replace_input(node, 0, self._grouped(query, queries, grouped, point))
        self.editor.replace_input(node, index or 1, rows)
        self._ungroup(output, grouped, point)

    def _grouped(self, query: ir.Value, queries: ir.Value, grouped: GroupedProduct, point: CachePoint) -> ir.Value:
        """Return queries as [batch, heads, rows, width]."""
        order, dtype = grouped.order(grouped.queries), self.flow.shapes[queries].dtype
        parts = [size for _, size in grouped.queries]
        merged = [point.batch, point.heads, grouped.rows, parts[order[-1]]]
        for operator, inputs, attributes, after in self._steps(self._sizes(queries), parts, order, merged):
            query = self.editor.node(
                operator, [query, *inputs], attributes, name=f"{query.name}.grouped", dtype=dtype,
                shape=dim_names(after),
            )  # fmt: skip
        return query

    def _ungroup(self, output: ir.Value, grouped: GroupedProduct, point: CachePoint) -> None:
        """Give the result of a product, [batch, heads, rows, width], the shape that it had."""
        order, dtype = grouped.order(grouped.result), self.flow.shapes[output].dtype or point.dtype
        parts = [grouped.result[place][1] for place in order]
        before = [point.batch, point.heads, grouped.rows, parts[-1]]
        back = [order.index(place) for place in range(len(order))]
        for operator, inputs, attributes, after in self._steps(before, parts, back, self._sizes(output)):
            shapes = dim_names(before), dim_names(after)
            output = self.editor.append_to(output, operator, inputs, dtype, shapes, attributes)
            before = after

    def _steps(
        self, before: list[Dimension], parts: list[Dimension], order: list[int], after: list[Dimension]
    ) -> Iterator[_Step]:
        """Yield what splits axes into parts, transposes these and merges them, without what does nothing."""
        if order != sorted(order):
            if not _same(before, parts):
                yield "Reshape", [self.lengths.reshape_target(parts, before)], None, parts
            before = [parts[place] for place in order]
            yield "Transpose", [], {"perm": order}, before
        if not _same(before, after):
            yield "Reshape", [self.lengths.reshape_target(after, before)], None, after

    def _rank(self, value: ir.Value) -> int:
        return len(self.flow.shapes[value].shape or ())

    def _sizes(self, value: ir.Value) -> list[Dimension]:
        shape = self.flow.shapes[value].shape or ()
        return self.tokens.slices.sizes(shape, self.tokens.axes_at(value, Length.NEW))


def _as_matmul(editor: Editor, product: ir.Node, index: int) -> bool:
    """Make a product one of matrices, with the input of an index as the second; return whether it transposes that."""
    if has_trait(product, Trait.EINSUM):
        editor.change_operator(product, "MatMul")
    for name in (*_QUERY_TRANSPOSES, *(["transB"] if index == 0 else [])):
        editor.remove_attribute(product, name)
    return bool(product.attributes.get_int("transB", 0))


def _is_free(product: ir.Node, trace: LayoutTrace, point: CachePoint) -> bool:
    """Return whether nothing is computed or copied: runtimes fuse a final swap of two axes into a product of matrices.

    An `Einsum` transposes its operands to matrices.
    """
    if has_trait(product, Trait.EINSUM) or trace.repeats > 1 or trace.scales or point.layout_cost == 2:
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
