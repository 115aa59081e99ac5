"""Conversion between the layout of a tensor in the graph and the layout of the cache."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.graph.query import is_operator
from kvsurgeon.resizing.lengths import LengthValues
from kvsurgeon.resizing.token_data import TokenRewriter
from kvsurgeon.symbolic.dim_names import dim_names
from kvsurgeon.symbolic.dimension import NEW, Dimension
from kvsurgeon.symbolic.sequence_axes import Length

Order = tuple[int, ...]  # for each axis of the cache its index in [batch, kv_heads, sequence, head_dim]

CANONICAL: Order = (0, 1, 2, 3)


def to_cache(lengths: LengthValues, point: CachePoint, order: Order = CANONICAL) -> ir.Value:
    """Return the new rows of a cached tensor in the layout of the cache."""
    return _transposed(lengths, point, _canonical_rows(lengths, point), order, f"{point.value.name}.as_cache")


def add_cached_rows(tokens: TokenRewriter, point: CachePoint, rows: ir.Value, order: Order) -> None:
    """Set the cached rows of a tensor, whose axes are in an order: what is computed from all rows reads them."""
    shape = tokens.flow.shapes[point.value].shape or ()
    sizes = tokens.slices.sizes(shape, tokens.axes_at(point.value, Length.TOTAL))
    tokens.add_total(point.value, from_cache(tokens.lengths, point, rows, sizes, order))


def from_cache(
    lengths: LengthValues, point: CachePoint, present: ir.Value, shape: Sequence[Dimension], order: Order = CANONICAL
) -> ir.Value:
    """Return the whole cache in the layout of the tensor.

    Args:
        lengths: Lengths at run time.
        point: The cached tensor.
        present: All rows, in the layout of the cache.
        shape: Shape of the tensor at the total length.
        order: Layout of the cache.
    """
    value, name = reordered(lengths, point, present, order), point.value.name or "rows"
    if point.is_canonical:
        return value
    if point.layout_cost == 2:
        parts = [lengths.total if size is None else size for size in point.parts]
        if not point.has_four_parts:
            value = _reshaped(lengths, point, value, [parts[place] for place in point.order], f"{name}.all_parts")
        back = [point.order.index(place) for place in range(len(point.order))]
        value = _transposed(lengths, point, value, back, f"{name}.all_in_order")
        if len(point.parts) == point.rank:
            return value
    return _reshaped(lengths, point, value, shape, f"{name}.all")


def reordered(
    lengths: LengthValues, point: CachePoint, present: ir.Value, order: Order, wanted: Order = CANONICAL
) -> ir.Value:
    """Return the whole cache, whose axes are in one order, in another order."""
    places = [order.index(place) for place in wanted]
    return _transposed(lengths, point, present, places, f"{point.value.name}.all_rows")


def is_canonical_view(value: ir.Value, point: CachePoint) -> bool:
    """Return whether a value is the cached tensor as [batch, heads, sequence, head_dim]."""
    if len(point.parts) != point.rank or point.rank != len(point.order):
        return False
    (source, order), (other, own) = _before_transposes(value, point.rank), _before_transposes(point.value, point.rank)
    return source is other and order == [own[place] for place in point.order]


def _canonical_rows(lengths: LengthValues, point: CachePoint) -> ir.Value:
    """Return the new rows as [batch, heads, sequence, head_dim]."""
    value, name = point.value, point.value.name or "rows"
    if point.is_canonical:
        return value
    if point.layout_cost == 2:
        if len(point.parts) != point.rank:
            parts = [NEW if size is None else size for size in point.parts]
            value = _reshaped(lengths, point, value, parts, f"{name}.parts")
        value = _transposed(lengths, point, value, point.order, f"{name}.heads_first")
        if point.has_four_parts:
            return value
    return _reshaped(lengths, point, value, [point.batch, point.heads, NEW, point.head_dim], f"{name}.rows")


def _reshaped(
    lengths: LengthValues, point: CachePoint, value: ir.Value, sizes: Sequence[Dimension], name: str
) -> ir.Value:
    target, shape = lengths.reshape_target(sizes), dim_names(sizes)
    return lengths.editor.node("Reshape", [value, target], name=name, dtype=point.dtype, shape=shape)


def _transposed(lengths: LengthValues, point: CachePoint, value: ir.Value, order: Sequence[int], name: str) -> ir.Value:
    if list(order) == list(range(len(order))):
        return value
    shape = None if value.shape is None else ir.Shape([value.shape[place] for place in order])
    return lengths.editor.node(
        "Transpose", [value], {"perm": list(order)}, name=name, dtype=point.dtype, shape=shape
    )  # fmt: skip


def _before_transposes(value: ir.Value, rank: int) -> tuple[ir.Value, list[int]]:
    """Return the value before any `Transpose` and `Identity`, and which of its axes each axis of the value is."""
    order = list(range(rank))
    while True:
        node = value.producer()
        source = None if node is None or not is_operator(node, "Transpose", "Identity") else node.inputs[0]
        if node is None or source is None:
            return value, order
        if node.op_type == "Transpose":
            axes = node.attributes.get_ints("perm") or list(range(rank))[::-1]
            if len(axes) != rank:
                return value, order
            order = [axes[place] for place in order]
        value = source
