"""Cache points: the tensor between a projection and an attention product that the KV cache stores.

Tensors upstream of a cache point have the query length S, tensors downstream the total length T. Every tensor on the
path would be correct, so the choice minimizes, in this order: bits per token, a head size other than the product's,
the cost of the layout (see `CachePoint.layout_cost`), not being a graph output, and the distance from the product,
which is computed again at each decode step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.token_data import is_token, token_inputs
from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import contraction_of, has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, Dimension
from kvsurgeon.symbolic.sequence_axes import Length, SequenceAxis

_MAX_VALUES = 400  # visited upstream of a product


@dataclass(frozen=True, kw_only=True)
class CachePoint:
    """A tensor to cache, and how its axes form [batch, heads, sequence, head_dim].

    Attributes:
        value: The tensor.
        dtype: Its type.
        parts: Sizes of its axes, in order; an axis that holds several dimensions is split. None is the sequence.
        order: The permutation of `parts` that gives [batch..., heads..., sequence, head_dim].
        batch: Size of the batch dimension; 1 if there is none.
        heads: Number of heads.
        head_dim: Number of features of one head.
        rank: Number of axes of the tensor.
    """

    value: ir.Value
    dtype: ir.DataType
    parts: tuple[Dimension | None, ...]
    order: tuple[int, ...]
    batch: Dimension
    heads: int
    head_dim: int
    rank: int

    @property
    def elements(self) -> int:
        """Number of elements of one token of one sequence."""
        return self.heads * self.head_dim

    @property
    def bits_per_token(self) -> int:
        """Size of one token of one sequence, in bits."""
        return self.elements * self.dtype.bitwidth

    @property
    def is_canonical(self) -> bool:
        """Whether the tensor itself is [batch, heads, sequence, head_dim]."""
        return self.order == (0, 1, 2, 3) and self.rank == 4 and self.has_four_parts

    @property
    def has_four_parts(self) -> bool:
        """Whether batch, heads, sequence and head_dim are one part each; a batch of 1 need not be a part."""
        return [self.parts[place] for place in self.order] == [self.batch, self.heads, None, self.head_dim]

    @property
    def layout_cost(self) -> int:
        """0 if the tensor has the cache layout, 1 if a reshape gives it, 2 if a transposition is needed."""
        if self.is_canonical:
            return 0
        moved = [place for place in self.order if self.parts[place] != 1]
        return 1 if moved == sorted(moved) else 2


def choose_cache_point(flow: TokenFlow, place: Place, heads: int = 1) -> CachePoint:
    """Return the tensor to cache for an operand of a product that is needed for all tokens so far.

    Args:
        flow: The token flow.
        place: The operand.
        heads: Number of heads that a fused operator finds on the features' axis.

    Raises:
        UnsupportedError: No tensor on the path can be cached.
    """
    return _smallest(flow, [place], heads)


def choose_shared_cache_point(flow: TokenFlow, places: Sequence[Place], heads: int = 1) -> CachePoint:
    """Return one tensor to cache, from which all of these operands are computed without a projection.

    Raises:
        UnsupportedError: The operands have no common tensor that can be cached.
    """
    return _smallest(flow, places, heads)


def _operands(flow: TokenFlow, places: Sequence[Place]) -> list[ir.Value]:
    origins = (flow.origin(place) for place in places)
    return [operand for node, index in origins if (operand := node.inputs[index]) is not None]


def _smallest(flow: TokenFlow, places: Sequence[Place], heads: int) -> CachePoint:
    operands, head_dim = _operands(flow, places), _head_dim(flow, places[0])
    ranked: list[tuple[tuple[int, bool, int, bool, int], CachePoint]] = []
    for distance, value in enumerate(bottlenecks(flow, operands)):
        point = cache_point_of(flow, value, heads)
        if point is not None:
            is_output = value.is_graph_output()
            rank = (point.bits_per_token, point.head_dim != head_dim, point.layout_cost, not is_output, distance)
            ranked.append((rank, point))
    if not ranked:
        raise UnsupportedError(
            "no tensor between projection and product can be cached", code=Code.NO_CACHE_POINT,
            at=operands[0].name, expected="a tensor with one sequence axis and a fixed number of features",
        )  # fmt: skip
    return min(ranked, key=lambda entry: entry[0])[1]


def _head_dim(flow: TokenFlow, place: Place) -> int | None:
    """Return the number of features of one head in an operand of a product; None if it is unknown."""
    node, index = place
    call = flow.shapes.call(node)
    contraction = contraction_of(call) if has_trait(node, Trait.PROJECTION) else None
    if contraction is None or index not in (contraction.left, contraction.right):
        return None
    labels, others = contraction.left_labels, contraction.right_labels
    if index == contraction.right:
        labels, others = others, labels
    sequence = {axis.axis for axis in flow.axes.get(node.inputs[index], ())}  # type: ignore[arg-type]
    width = dim.product(
        size
        for axis, (label, size) in enumerate(zip(labels, call.fact(index).shape or (), strict=True))
        if axis not in sequence and not (label in others and label in contraction.result_labels)
    )
    return width if isinstance(width, int) else None


def _is_cheap(node: ir.Node) -> bool:
    """Return whether each decode step may compute a node again for all tokens so far."""
    return not has_trait(node, Trait.PROJECTION) and is_no_table_lookup(node)


def is_no_table_lookup(node: ir.Node) -> bool:
    """Return whether a node is not a lookup in a constant table, such as an embedding."""
    return not has_trait(node, Trait.LOOKUP) or constant_tensor(node.inputs[0]) is None


def bottlenecks(
    flow: TokenFlow, operands: Sequence[ir.Value], may_repeat: Callable[[ir.Node], bool] = _is_cheap
) -> Iterator[ir.Value]:
    """Yield the tensors that all token data of some operands passes through, from the product to the projection."""
    visited = set(operands)
    pending = list(dict.fromkeys(operands))
    while len(visited) < _MAX_VALUES:
        if len(pending) == 1 and pending[0] not in flow.per_call:
            yield pending[0]
        value = max(pending, key=flow.position)
        node = value.producer()
        if node is None or not may_repeat(node) or not _is_position_wise(flow, node):
            return
        pending.remove(value)
        pending += [source for source in token_inputs(flow, node) if source not in pending]
        visited.add(value)
        pending = [source for source in pending if source not in node.outputs]


def _is_position_wise(flow: TokenFlow, node: ir.Node) -> bool:
    for index, value in enumerate(node.inputs):
        if (node, index) in flow.addresses:
            return False  # indices of the query length
        if value is None or not is_token(flow, value) or flow.is_range(value):
            continue
        if (node, index) in flow.operands:
            return False
        axes = flow.axes.get(value, ())
        if len(axes) != 1 or axes[0].variable.resolved() is not Length.NEW:
            return False
    return True


def cache_point_of(flow: TokenFlow, value: ir.Value, heads: int = 1) -> CachePoint | None:
    """Return a tensor as a cache point; None if it has no fixed number of features per token."""
    fact, axes = flow.shapes[value], flow.axes.get(value, ())
    if fact.shape is None or fact.dtype is None or len(axes) != 1 or axes[0].variable.resolved() is not Length.NEW:
        return None
    split = _split(fact.shape, axes[0], flow.batch)
    if split is None:
        return None
    parts, batch = split
    sequence, last = parts.index(None), parts[-1]
    if heads > 1 and len(parts) == 3 and isinstance(last, int) and sequence != 2 and last % heads == 0:
        parts = [*parts[:-1], heads, last // heads]
    features = [place for place in range(len(parts)) if place not in (*batch, sequence)]
    if not features:  # a number for each token
        features, parts = [len(parts)], [*parts, 1]
    sizes = [size for place in features if isinstance(size := parts[place], int)]
    if len(sizes) < len(features):
        return None
    return CachePoint(
        value=value,
        dtype=fact.dtype,
        parts=tuple(parts),
        order=(*batch, *features[:-1], sequence, features[-1]),
        batch=dim.product(size for place in batch if (size := parts[place]) is not None),
        heads=math.prod(sizes[:-1]),
        head_dim=sizes[-1],
        rank=len(fact.shape),
    )


def _split(
    shape: tuple[Dimension, ...], axis: SequenceAxis, fixed: Dimension
) -> tuple[list[Dimension | None], list[int]] | None:
    """Return a shape with batch, sequence (None) and features separated, and the places of the batch."""
    parts: list[Dimension | None] = []
    batch: list[int] = []
    for place, size in enumerate(shape):
        pieces: list[Dimension | None] = [size]
        if place == axis.axis:
            pieces = [*([axis.outer] if axis.outer != 1 else []), None, *([axis.inner] if axis.inner != 1 else [])]
        for piece in pieces:
            if piece is None or isinstance(piece, int) or not piece.has(BATCH):
                parts.append(piece)
                continue
            rest = dim.exact_quotient(piece, BATCH)
            if not isinstance(rest, int):
                return None
            batch.append(len(parts))
            parts += [BATCH, rest] if rest != 1 else [BATCH]
    if not batch and isinstance(fixed, int) and parts[0] == fixed and len(parts) > 2:
        batch = [0]
    return (parts, batch) if len(batch) <= 1 else None
