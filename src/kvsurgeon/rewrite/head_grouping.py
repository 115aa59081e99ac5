"""Keys and values are multiplied where they lie in the cache.

An export repeats the heads of keys and values for the queries that share them, scales them and lays them out anew: at
every step, for all tokens so far. The queries that share a head are as well rows of one product with it, and there is
one row for a new token only: [batch, heads * repeats, rows, head_dim] is [batch, heads, repeats * rows, head_dim]
without a number being moved.
Source of the grouping: Ainslie et al., "GQA", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.analysis.analysis import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.analysis.token_flow import FusedAttention, TokenFlow
from kvsurgeon.rewrite.cache_layouts import USUAL, CacheLayouts, Order
from kvsurgeon.rewrite.dimension_names import dim_names
from kvsurgeon.rewrite.layout_trace import FEATURES, TOKENS, LayoutTrace, read
from kvsurgeon.rewrite.reshape_targets import reshape_target
from kvsurgeon.rewrite.token_data import TokenRewriter
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import Length

_PRODUCTS = frozenset({"MatMul", "FusedMatMul"})
_MOVES_QUERIES = ("transA", "transBatchA", "transBatchB")  # attributes of FusedMatMul
_AS_COLUMNS: Order = (0, 1, 3, 2)


class HeadGrouping:
    """Gives products what is remembered, and lets them read the cache as it is where that saves work."""

    def __init__(self, flow: TokenFlow, tokens: TokenRewriter, layouts: CacheLayouts) -> None:
        self.flow = flow
        self.tokens = tokens
        self.layouts = layouts
        self.editor = tokens.editor
        self._caches: dict[ir.Value, tuple[ir.Value, Order]] = {}

    def remember(self, memory: CachePoint, whole: ir.Value, order: Order) -> None:
        """Let what is downstream of the cut read `whole`: all tokens so far, with the axes in that order."""
        shape = self.flow.shapes[memory.value].shape or ()
        own = self.tokens.views.sizes(shape, self.tokens.axes_at(memory.value, Length.TOTAL))
        self.tokens.remember(memory.value, self.layouts.from_cache(memory, whole, own, order))
        self._caches[memory.value] = whole, order

    def regroup(self, head: AttentionSite) -> None:
        """Regroup the products of one attention, where it saves work for every token so far."""
        if head.fused is not None:
            self._share_heads(head.fused, (*head.keys, *head.values))
            return
        for operand in head.keys:
            self._regroup(operand, may_scale=True)
        for operand in head.values:
            self._regroup(operand, may_scale=False)

    def _share_heads(self, fused: FusedAttention, operands: Sequence[CachedOperand]) -> None:
        """Let a fused operator share the heads of keys and values among its queries by itself, if it shares both."""
        if len(fused.layout) != 4:
            return
        caches = []
        for operand in operands:
            node, index = operand.place
            value = self.tokens.before[node][index]
            reading = None if value is None else read(self.flow, self.tokens.before, value, operand.memory)
            if reading is None or reading.repeats == 1 or reading.scales:
                return
            if not reading.stacks_heads(((TOKENS,), (FEATURES,))) or len(reading.axes) != 4:
                return
            cache, order = self._caches[operand.memory.value]
            caches.append((operand, cache, order))
        for operand, cache, order in caches:
            rows = self.layouts.all_rows(operand.memory, cache, order, USUAL)
            self.editor.replace_input(*operand.place, rows)

    def _regroup(self, operand: CachedOperand, *, may_scale: bool) -> None:
        node, index = operand.place
        value, partner = self.tokens.before[node][index], self.tokens.before[node][1 - index] if index == 1 else None
        if not _is_plain(node) or value is None or partner is None:
            return
        reading = read(self.flow, self.tokens.before, value, operand.memory)
        if reading is None or (reading.scales and not may_scale) or self._is_free(reading, operand.memory):
            return
        if not self._stands_beside(partner, value, reading):
            return
        last = reading.axes[-2:]
        if set(last) == {(TOKENS,), (FEATURES,)} and reading.stacks_heads(last):
            self._rewire(operand, reading, partner)

    def _stands_beside(self, partner: ir.Value, value: ir.Value, reading: LayoutTrace) -> bool:
        """Whether the other operand has the same axes before its last two, and can be scaled without getting more."""
        mine, theirs = self.flow.shapes[partner].shape, self.flow.shapes[value].shape
        if mine is None or theirs is None or not _same(mine[:-2], theirs[:-2]):
            return False
        return all(len(self.flow.shapes[scale].shape or ()) <= len(mine) for _, scale in reading.scales)

    def _is_free(self, reading: LayoutTrace, memory: CachePoint) -> bool:
        """Whether nothing is computed or copied: runtimes make a last swap of two axes part of the product."""
        if reading.repeats > 1 or reading.scales or memory.layout_cost == 2:
            return False
        return not any(_copies(step, is_last=step is reading.steps[-1]) for step in reading.steps)

    def _rewire(self, operand: CachedOperand, reading: LayoutTrace, partner: ir.Value) -> None:
        (node, index), memory = operand.place, operand.memory
        cache, order = self._caches[memory.value]
        cache = self.layouts.all_rows(memory, cache, order, _AS_COLUMNS if reading.axes[-1] == (TOKENS,) else USUAL)
        given = node.inputs[1 - index]
        assert given is not None
        for operator, scale in reading.scales:
            inputs = [given, self.tokens.views.slice_of(scale, ())]
            given = self.editor.node(operator, inputs, name=f"{partner.name}.scaled", dtype=memory.dtype)
        apart, result = self._sizes(partner), self._sizes(node.outputs[0])
        rows = dim.multiply(reading.repeats, apart[-2])
        grouped = [memory.batch, memory.heads, rows, apart[-1]]
        self.editor.replace_input(node, 1 - index, self._reshaped(given, apart, grouped, memory.dtype))
        self.editor.replace_input(node, index, cache)
        grouped = [memory.batch, memory.heads, rows, result[-1]]
        if not _same(grouped, result):
            target = reshape_target(self.tokens.lengths, result, grouped)
            shapes = dim_names(grouped), dim_names(result)
            self.editor.append_to(node.outputs[0], "Reshape", [target], memory.dtype, shapes)

    def _sizes(self, value: ir.Value) -> list[Dimension]:
        return self.tokens.views.sizes(self.flow.shapes[value].shape or (), self.tokens.axes_at(value, Length.NEW))

    def _reshaped(
        self, value: ir.Value, before: Sequence[Dimension], after: Sequence[Dimension], dtype: ir.DataType
    ) -> ir.Value:
        if _same(before, after):
            return value
        target, name = reshape_target(self.tokens.lengths, after, before), f"{value.name}.grouped"
        return self.editor.node("Reshape", [value, target], name=name, dtype=dtype, shape=dim_names(after))


def _is_plain(product: ir.Node) -> bool:
    """Whether the rows of the first operand are the rows of a result that nobody outside the graph reads."""
    moved = any(product.attributes.get_int(name, 0) for name in _MOVES_QUERIES)
    return product.op_type in _PRODUCTS and not moved and not product.outputs[0].is_graph_output()


def _copies(step: ir.Node, *, is_last: bool) -> bool:
    """Whether an operator that moves numbers is more than the swap of rows and columns before a product."""
    if step.op_type != "Transpose":
        return False
    order = list(step.attributes.get_ints("perm") or ())
    swap = [*range(len(order) - 2), len(order) - 1, len(order) - 2]
    return not is_last or order != swap


def _same(mine: Sequence[Dimension], theirs: Sequence[Dimension]) -> bool:
    return len(mine) == len(theirs) and all(dim.is_equal(one, other) for one, other in zip(mine, theirs, strict=True))
