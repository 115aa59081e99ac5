"""Between a tensor's own layout and that of the cache, [batch, kv_heads, sequence, head_dim] in any order."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.graph.editor import Editor
from kvsurgeon.rewrite.dimension_names import dim_names
from kvsurgeon.rewrite.lengths import LengthValues
from kvsurgeon.rewrite.reshape_targets import reshape_target
from kvsurgeon.symbolic.dimension import NEW, Dimension

Order = tuple[int, int, int, int]  # of the cache's axes: places in [batch, kv_heads, sequence, head_dim]

USUAL: Order = (0, 1, 2, 3)


class CacheLayouts:
    """Brings new rows into the cache's layout, and the whole cache back into the tensor's own."""

    def __init__(self, editor: Editor, lengths: LengthValues) -> None:
        self.editor = editor
        self.lengths = lengths

    def as_cache(self, memory: CachePoint, order: Order = USUAL) -> ir.Value:
        """The tensor's new rows, as [batch, heads, sequence, head_dim] in that order."""
        return self._transposed(memory, self._rows(memory), order, f"{memory.value.name}.as_cache")

    def from_cache(
        self, memory: CachePoint, present: ir.Value, own: Sequence[Dimension], order: Order = USUAL
    ) -> ir.Value:
        """The whole cache in the tensor's own layout, whose dimensions at the total length are `own`."""
        return self._own(memory, self.all_rows(memory, present, order), own)

    def all_rows(self, memory: CachePoint, present: ir.Value, order: Order = USUAL, wanted: Order = USUAL) -> ir.Value:
        """The whole cache, which has its axes in one order, in another."""
        places = [order.index(place) for place in wanted]
        return self._transposed(memory, present, places, f"{memory.value.name}.all_rows")

    def _rows(self, memory: CachePoint) -> ir.Value:
        """The tensor's new rows, as [batch, heads, sequence, head_dim]."""
        if memory.is_canonical:
            return memory.value
        value, name = memory.value, memory.value.name or "rows"
        if memory.layout_cost == 2:
            if len(memory.parts) != memory.rank:
                value = self._reshaped(memory, value, _sizes(memory.parts, NEW), f"{name}.parts")
            value = self._transposed(memory, value, memory.order, f"{name}.heads_first")
            if memory.has_four_parts:
                return value
        return self._reshaped(memory, value, [memory.batch, memory.heads, NEW, memory.head_dim], f"{name}.rows")

    def _own(self, memory: CachePoint, present: ir.Value, own: Sequence[Dimension]) -> ir.Value:
        if memory.is_canonical:
            return present
        value, name = present, memory.value.name or "rows"
        if memory.layout_cost == 2:
            sizes = _sizes(memory.parts, self.lengths.total)
            if not memory.has_four_parts:
                value = self._reshaped(memory, value, [sizes[place] for place in memory.order], f"{name}.all_parts")
            back = [memory.order.index(place) for place in range(len(memory.order))]
            value = self._transposed(memory, value, back, f"{name}.all_in_order")
            if len(memory.parts) == memory.rank:
                return value
        return self._reshaped(memory, value, own, f"{name}.all")

    def _reshaped(self, memory: CachePoint, value: ir.Value, sizes: Sequence[Dimension], name: str) -> ir.Value:
        target = reshape_target(self.lengths, sizes)
        return self.editor.node("Reshape", [value, target], name=name, dtype=memory.dtype, shape=dim_names(sizes))

    def _transposed(self, memory: CachePoint, value: ir.Value, order: Sequence[int], name: str) -> ir.Value:
        if list(order) == list(range(len(order))):
            return value
        transposed = self.editor.node("Transpose", [value], {"perm": list(order)}, name=name, dtype=memory.dtype)
        if value.shape is not None:
            transposed.shape = ir.Shape([value.shape[place] for place in order])
        return transposed


def _sizes(parts: Sequence[Dimension | None], length: Dimension) -> list[Dimension]:
    return [length if size is None else size for size in parts]


def are_rows_of(value: ir.Value, memory: CachePoint) -> bool:
    """Whether a value is what is remembered, laid out as [batch, heads, sequence, head_dim]."""
    if len(memory.parts) != memory.rank or memory.rank != len(memory.order):
        return False
    (source, order), (other, own) = _transposed_from(value), _transposed_from(memory.value)
    if source is not other:
        return False
    if own is not None:
        return order == [own[place] for place in memory.order]
    return (order or list(range(memory.rank))) == list(memory.order)


def _transposed_from(value: ir.Value) -> tuple[ir.Value, list[int] | None]:
    """The tensor that a value is with its axes in another order, and that order."""
    node = value.producer()
    order = None if node is None or node.op_type != "Transpose" else node.attributes.get_ints("perm")
    if node is None or order is None or node.inputs[0] is None:
        return value, None
    return node.inputs[0], list(order)
