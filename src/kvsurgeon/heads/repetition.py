"""Repetition of KV heads between projection and product: by nodes, by broadcasting or within an operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir

from kvsurgeon.analysis.attention_sites import AttentionSite, CachedOperand
from kvsurgeon.analysis.cache_points import cache_point_of
from kvsurgeon.analysis.token_data import token_inputs
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.query import chain, producers, upstream
from kvsurgeon.heads.counts import HeadCounts
from kvsurgeon.heads.head_axis import HeadAxis
from kvsurgeon.heads.index_trace import IndexTrace
from kvsurgeon.heads.layout import NamedDims, head_axis, layout_of, named_dims
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadRepetition:
    """The repetition of KV heads before one operand of a product.

    Attributes:
        operand: The operand.
        sharing: Whether nodes repeat the heads, the product broadcasts them, or one operator shares them natively.
            Without repetition, if there are as many KV heads as query heads, it is "repeated".
        start: The value with each head once.
        end: The value with repeated heads; `start` if no node repeats them.
        heads: For each head of `end` the head of `start`, `[heads of end]`.
        axis: The head axis of `start`.
        start_dims: Dimensions of `start`.
        end_dims: Dimensions of `end`.
        readers: The node inputs that read `end` for this product.
    """

    operand: CachedOperand
    sharing: Literal["repeated", "broadcast", "native"]
    start: ir.Value
    end: ir.Value
    heads: np.ndarray
    axis: HeadAxis
    start_dims: NamedDims
    end_dims: NamedDims
    readers: tuple[tuple[ir.Node, int], ...]

    @property
    def value(self) -> ir.Value:
        """The value of the operand."""
        return operand_value(self.operand)


def operand_value(operand: CachedOperand) -> ir.Value:
    """Return the value of an operand."""
    node, index = operand.place
    value = node.inputs[index]
    assert value is not None
    return value


def find_repetition(
    trace: IndexTrace, layer: int, site: AttentionSite, operand: CachedOperand, counts: HeadCounts
) -> HeadRepetition:
    """Return how the heads of keys or values of an attention are repeated.

    Raises:
        UnsupportedError: The heads cannot be traced.
    """
    try:
        return _find(trace, site, operand, counts)
    except UnsupportedError as error:
        error.layer = layer if error.layer is None else error.layer
        raise


def _find(trace: IndexTrace, site: AttentionSite, operand: CachedOperand, counts: HeadCounts) -> HeadRepetition:
    features = counts.value_dim if operand in site.values else counts.head_dim
    value, between = operand_value(operand), _nodes_between(trace, operand)
    start, end = _repeated_values(trace, operand, between, counts.kv_heads * features)
    sharing: Literal["repeated", "broadcast", "native"] = "repeated"
    if start is not end:
        table = trace.feature_indices(start, end).reshape(-1, features)
        heads, offsets = np.divmod(table, features)
        if not (offsets == np.arange(features)).all() or not (heads == heads[:, :1]).all():
            raise UnsupportedError("heads are not repeated as a whole", code=Code.UNTRACEABLE_HEADS, at=end.name)
        repeated = heads[:, 0]
    elif layout_of(trace.flow, value).width != features * counts.kv_heads:
        raise UnsupportedError(
            "cannot trace where heads are repeated before the product", code=Code.UNTRACEABLE_HEADS, at=value.name
        )
    else:
        repeated = np.arange(counts.kv_heads)
        if site.fused is None and counts.kv_heads == counts.heads:
            path, cached = _path_to_product(trace, value), operand.cache_point.value
            start = end = cached if cached in path else path[0]
        else:
            sharing = "broadcast" if site.fused is None else "native"
    layout = layout_of(trace.flow, start)
    start_dims = named_dims(layout, layout.width // features, start)
    end_dims = named_dims(layout_of(trace.flow, end), len(repeated), end)
    axis = head_axis(layout, start_dims, start)
    readers = [(node, index) for node, index in end.uses() if node in between]
    return HeadRepetition(
        operand=operand, sharing=sharing, start=start, end=end, heads=repeated, axis=axis, start_dims=start_dims,
        end_dims=end_dims, readers=tuple(readers) if sharing == "repeated" else (operand.place,),
    )  # fmt: skip


def _repeated_values(
    trace: IndexTrace, operand: CachedOperand, between: set[ir.Node], width: int
) -> tuple[ir.Value, ir.Value]:
    """The last value with each head once, and the last repetition of it; twice the operand if there is none.

    The nodes in between are added to `between`.
    """
    value = operand_value(operand)
    before_cache = list(_repetitions_before_cache(trace, operand, between))
    for path in (_path_to_product(trace, value), _path_from_cache(trace, operand, between), *before_cache):
        widths = [layout_of(trace.flow, one).width for one in path]
        if width not in widths or set(widths[widths.index(width) :]) == {width}:
            continue
        first = last = _last_with_all_heads(widths, width)
        while last + 1 < len(path) and trace.rearranges(path[last + 1].producer()):
            last += 1
        between.update(producers(path[first + 1 :]))
        return path[first], path[last]
    return value, value


def _last_with_all_heads(widths: Sequence[int], width: int) -> int:
    """Return the last place of this width before one that is narrower: from there on heads are missing."""
    start = widths.index(width)
    narrower = next((place for place in range(start, len(widths)) if widths[place] < width), len(widths))
    return max(place for place in range(start, narrower) if widths[place] == width)


def _nodes_between(trace: IndexTrace, operand: CachedOperand) -> set[ir.Node]:
    """The nodes between the cache point and the product, the product included."""
    cached = operand.cache_point.value
    values = upstream(
        [operand_value(operand)], stop=lambda value: value is cached, inputs=partial(token_inputs, trace.flow)
    )
    return {operand.place[0], *producers(value for value in values if value is not cached)}


def _path_to_product(trace: IndexTrace, value: ir.Value) -> list[ir.Value]:
    """The values that an operand is computed from elementwise or by moving elements, the operand last."""

    def source(node: ir.Node) -> ir.Value | None:
        sources = token_inputs(trace.flow, node)
        return sources[0] if trace.is_elementwise(node) and len(sources) == 1 and _is_plain(trace, sources[0]) else None

    return list(chain(value, source))[::-1]


def _path_from_cache(trace: IndexTrace, operand: CachedOperand, between: set[ir.Node]) -> list[ir.Value]:
    """The values from the cache point towards the product, up to a node that combines several."""
    path, last = [operand.cache_point.value], operand_value(operand)
    while path[-1] is not last:
        nodes = {node for node, _ in path[-1].uses() if node in between}
        node = nodes.pop() if len(nodes) == 1 else None
        if node is None or not trace.is_elementwise(node) or len(token_inputs(trace.flow, node)) != 1:
            break
        outputs = [value for value in node.outputs if any(user in between for user, _ in value.uses())]
        if not outputs or not _is_plain(trace, outputs[0]):
            break
        path.append(outputs[0])
    return path


def _repetitions_before_cache(
    trace: IndexTrace, operand: CachedOperand, between: set[ir.Node]
) -> Iterator[list[ir.Value]]:
    """Paths between projection and cache point on which a value gets wider; their nodes are added to `between`."""

    def projected(node: ir.Node) -> list[ir.Value]:
        if has_trait(node, Trait.PROJECTION):
            return []
        return [value for value in token_inputs(trace.flow, node) if trace.is_projected(value)]

    for value in upstream([operand.cache_point.value], inputs=projected):
        node = value.producer()
        sources = [] if node is None else projected(node)
        # A node that joins several sources does not repeat heads.
        if node is None or len(sources) != 1 or not trace.rearranges(node):
            continue
        if not _is_plain(trace, value) or not _is_plain(trace, sources[0]):
            continue
        if layout_of(trace.flow, value).width > layout_of(trace.flow, sources[0]).width:
            moved = _moved(trace, value)
            between.update((node, *(user for one in moved for user, _ in one.uses())))
            yield [sources[0], *moved]


def _moved(trace: IndexTrace, value: ir.Value) -> list[ir.Value]:
    """A value, then the values computed from it by moving elements, as long as each has one reader."""
    path = [value]
    while len(users := {node for node, _ in path[-1].uses()}) == 1 and trace.rearranges(node := users.pop()):
        if len(node.outputs) > 1 or not _is_plain(trace, node.outputs[0]):
            break
        path.append(node.outputs[0])
    return path


def _is_plain(trace: IndexTrace, value: ir.Value) -> bool:
    return cache_point_of(trace.flow, value) is not None
