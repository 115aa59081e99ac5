"""Where to cut: which tensor between a projection and a product is remembered for the past.

Upstream of a cut tensors have the new length, downstream the total one. Any tensor of the chain would do, so the choice
is a matter of bytes: the smallest; among equals one with the heads that the product sees, then one that already lies as
[batch, kv_heads, sequence, head_dim], then one that the export gives out, then the one closest to the product, so that
least is computed again at a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import Place, TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import contraction_of, has_trait
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import BATCH, Dimension
from kvsurgeon.symbolic.sequence_axes import Length, SequenceAxis

# Products with weights: what lies upstream of them would have to be computed again for every token at every step.


@dataclass(frozen=True, kw_only=True)
class CachePoint:
    """A tensor that is remembered, and how its axes make up [batch, heads, sequence, head_dim].

    The tensor's axes, cut up where they hold several things, are `parts`; `order` brings them into
    [batch..., heads..., sequence, head_dim].
    """

    value: ir.Value
    dtype: ir.DataType
    parts: tuple[Dimension | None, ...]  # sizes in the tensor's own order; None is the sequence
    order: tuple[int, ...]
    batch: Dimension
    heads: int
    head_dim: int
    elements: int  # of one token of one sequence
    rank: int

    @property
    def bits_per_token(self) -> int:
        """Bits that one token of one sequence takes."""
        return self.elements * self.dtype.bitwidth

    @property
    def is_canonical(self) -> bool:
        """Whether the tensor itself is [batch, heads, sequence, head_dim]."""
        return self.order == (0, 1, 2, 3) and self.rank == 4 and self.has_four

    @property
    def has_four(self) -> bool:
        """Whether batch, heads, sequence and head_dim are a part each; a batch that is fixed to 1 need be none."""
        return [self.parts[place] for place in self.order] == [self.batch, self.heads, None, self.head_dim]

    @property
    def effort(self) -> int:
        """0 where the tensor lies right, 1 where a reshape is enough, 2 where it must be transposed."""
        if self.is_canonical:
            return 0
        moved = [place for place in self.order if self.parts[place] != 1]
        return 1 if moved == sorted(moved) else 2


def choose_for_all(flow: TokenFlow, places: Sequence[Place], heads: int = 1) -> CachePoint:
    """Return one tensor to remember, of which all of these operands are made.

    Where they meet on this side of a product with weights it is chosen as for one operand; where they do not, it is
    the nearest tensor that they have in common, and the products are done again for all tokens at every step.

    Raises:
        UnsupportedError: They have none in common that can be remembered.
    """
    try:
        return _smallest(flow, places, heads)
    except UnsupportedError:
        near = (describe(flow, value, heads) for value in bottlenecks(flow, _operands(flow, places), looks_nothing_up))
        memory = next((memory for memory in near if memory is not None), None)
        if memory is None:
            raise
        return memory


def choose(flow: TokenFlow, place: Place, heads: int = 1) -> CachePoint:
    """Return the tensor to remember for an operand that is needed for all tokens so far.

    Args:
        flow: What was learnt about token data.
        place: The operand.
        heads: How many heads a fused operator finds side by side on the features' axis.

    Raises:
        UnsupportedError: No tensor of the chain can be remembered.
    """
    return _smallest(flow, [place], heads)


def _operands(flow: TokenFlow, places: Sequence[Place]) -> list[ir.Value]:
    origins = (flow.origin(place) for place in places)
    return [operand for node, index in origins if (operand := node.inputs[index]) is not None]


def _smallest(flow: TokenFlow, places: Sequence[Place], heads: int) -> CachePoint:
    operands, width = _operands(flow, places), features_of(flow, places[0])
    best: tuple[tuple[int, bool, int, bool, int], CachePoint] | None = None
    for distance, value in enumerate(bottlenecks(flow, operands)):
        memory = describe(flow, value, heads)
        if memory is None:
            continue
        given_out = value.is_graph_output()
        rank = (memory.bits_per_token, memory.head_dim != width, memory.effort, not given_out, distance)
        if best is None or rank < best[0]:
            best = (rank, memory)
    if best is None:
        raise UnsupportedError(
            "no tensor between projection and product can be remembered",
            at=operands[0].name, expected="a tensor with one sequence axis and a fixed number of features",
        )  # fmt: skip
    return best[1]


def features_of(flow: TokenFlow, place: Place) -> int | None:
    """How many features of one head and one token an operand of a product holds: head_dim."""
    node, index = place
    call = flow.shapes.call(node)
    found = contraction_of(call) if has_trait(node, Trait.PROJECTION) else None
    if found is None or index not in (found.left, found.right):
        return None
    mine, other = found.left_labels, found.right_labels
    if index == found.right:
        mine, other = other, mine
    held = {axis.axis for axis in flow.axes.get(node.inputs[index], ())}  # type: ignore[arg-type]
    sizes = [
        size
        for axis, (label, size) in enumerate(zip(mine, call.fact(index).shape or (), strict=True))
        if axis not in held and not (label in other and label in found.result_labels)
    ]
    width = dim.product(sizes)
    return width if isinstance(width, int) else None


def _is_cheap(node: ir.Node) -> bool:
    """Whether a node may be computed again for all tokens so far at every step."""
    return not has_trait(node, Trait.PROJECTION) and looks_nothing_up(node)


def looks_nothing_up(node: ir.Node) -> bool:
    """Whether a node is no table of weights read by number: upstream of one there are only numbers of tokens."""
    return not has_trait(node, Trait.LOOKUP) or constant_tensor(node.inputs[0]) is None


def bottlenecks(
    flow: TokenFlow, operands: Sequence[ir.Value], may_repeat: Callable[[ir.Node], bool] = _is_cheap
) -> Iterator[ir.Value]:
    """Tensors through which all token data of some operands passes, from the product upwards to the projection."""
    order = dict.fromkeys(operands, 0)
    frontier = list(order)
    while len(order) < 400:
        if len(frontier) == 1 and frontier[0] not in flow.per_call:
            yield frontier[0]
        value = max(frontier, key=lambda value: _place(flow, value))
        node = value.producer()
        if node is None or not may_repeat(node) or not _sees_tokens_one_by_one(flow, node):
            return
        frontier.remove(value)
        for source in node.inputs:
            if source is not None and flow.kinds.get(source) is ValueKind.TOKEN and source not in frontier:
                frontier.append(source)
        order[value] = len(order)
        frontier = [source for source in frontier if source not in node.outputs]


def _place(flow: TokenFlow, value: ir.Value) -> int:
    """Where in the graph a value is made; graph inputs before all else."""
    node = value.producer()
    return -1 if node is None else flow.order.get(node, -1)


def _sees_tokens_one_by_one(flow: TokenFlow, node: ir.Node) -> bool:
    for index, value in enumerate(node.inputs):
        if (node, index) in flow.addresses:
            return False  # which are as long as the call
        if value is None or flow.kinds.get(value) is not ValueKind.TOKEN:
            continue
        if (node, index) in flow.operands:
            return False
        axes = flow.axes.get(value, ())
        if len(axes) != 1 or axes[0].role.resolved() is not Length.NEW:
            return False
    return True


def describe(flow: TokenFlow, value: ir.Value, heads: int = 1) -> CachePoint | None:
    """Return how a tensor can be remembered; None where it has no fixed number of features for each token."""
    fact, axes = flow.shapes[value], flow.axes.get(value, ())
    if fact.shape is None or fact.dtype is None or len(axes) != 1 or axes[0].role.resolved() is not Length.NEW:
        return None
    found = _parts(fact.shape, axes[0], flow.batch)
    if found is None:
        return None
    parts, sequence, batch = found
    last = parts[-1]
    if heads > 1 and len(parts) == 3 and isinstance(last, int) and sequence != 2 and last % heads == 0:
        parts = [*parts[:-1], heads, last // heads]
    features = [place for place in range(len(parts)) if place not in (*batch, sequence)]
    sizes = [parts[place] for place in features]
    if not features or not all(isinstance(size, int) for size in sizes):
        return None
    whole = [int(size) for size in sizes if isinstance(size, int)]
    count = math.prod(whole[:-1])
    return CachePoint(
        value=value,
        dtype=fact.dtype,
        parts=tuple(parts),
        order=(*batch, *features[:-1], sequence, features[-1]),
        batch=dim.product(size for place in batch if (size := parts[place]) is not None),
        heads=count,
        head_dim=whole[-1],
        elements=count * whole[-1],
        rank=len(fact.shape),
    )


def _parts(
    shape: tuple[Dimension, ...], axis: SequenceAxis, fixed: Dimension
) -> tuple[list[Dimension | None], int, list[int]] | None:
    """Cut the axes up: batch, sequence, and features, each in a place of its own."""
    parts: list[Dimension | None] = []
    batch: list[int] = []
    sequence = -1
    for place, size in enumerate(shape):
        pieces: list[Dimension | None] = [size]
        if place == axis.axis:
            pieces = [*([axis.outer] if axis.outer != 1 else []), None, *([axis.inner] if axis.inner != 1 else [])]
        for piece in pieces:
            if piece is None:
                sequence = len(parts)
                parts.append(None)
            elif not isinstance(piece, int) and piece.has(BATCH):
                rest = dim.exact_quotient(piece, BATCH)
                if rest is None or not isinstance(rest, int):
                    return None
                batch.append(len(parts))
                parts += [BATCH, rest] if rest != 1 else [BATCH]
            else:
                parts.append(piece)
    if not batch and isinstance(fixed, int) and parts[0] == fixed and len(parts) > 2:
        batch = [0]
    return (parts, sequence, batch) if len(batch) <= 1 else None
