"""A product of queries with cached keys or values as one of matrices of [batch, heads]: which dimensions become rows.

Queries that share a head are rows of one matrix. The dimensions of scores keep their order as far as possible, since
those of queries and results are moved for new tokens only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvsurgeon.ops.contraction import Contraction
from kvsurgeon.rewrite.layout_trace import BATCH, HEAD_DIM, HEADS, SEQUENCE, Labels, LayoutTrace, rank_of
from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension

_WIDTH = "width"  # what a product sums, or what its result has instead
_ROWS = "rows"

Parts = tuple[tuple[str, Dimension], ...]  # dimensions of a tensor, outermost first: label and size


@dataclass(frozen=True, kw_only=True)
class GroupedProduct:
    """Arrangement of the operands of a product.

    Attributes:
        queries: Dimensions of the operand that meets the cache; an axis may hold several.
        result: Dimensions of the result.
        sums_tokens: Whether the product sums the tokens of the cache, as one with values does.
    """

    queries: Parts
    result: Parts
    sums_tokens: bool

    def order(self, parts: Parts) -> list[int]:
        """Return the permutation of some dimensions that gives [batch, heads, rows, width]."""
        labels = [label for label, _ in sorted(self._scores, key=lambda part: _rank(part[0]))]
        return sorted(range(len(parts)), key=lambda place: labels.index(parts[place][0]))

    @property
    def rows(self) -> Dimension:
        """Number of rows: of queries, times those that share a head."""
        return dim.product(size for label, size in self.queries if _rank(label) == _rank(_ROWS))

    @property
    def _scores(self) -> Parts:
        return self.queries if self.sums_tokens else self.result


def _rank(label: str) -> tuple[int, int]:
    """Return the rank of a dimension in [batch, heads, rows, width]."""
    if label == _WIDTH:
        return 3, 0
    return rank_of(label) if label.startswith((BATCH, HEADS)) else (2, 0)


def group_product(
    found: Contraction, index: int, trace: LayoutTrace, queries: Sequence[Dimension], result: Sequence[Dimension]
) -> GroupedProduct | None:
    """Return the arrangement of a product; None if it is none of one matrix for each head of the cache.

    Args:
        found: The product.
        index: Which input of its node holds the keys or values.
        trace: Layout of the keys or values.
        queries: Shape of the other operand.
        result: Shape of the result.
    """
    labels, cached = found.left_labels, found.right_labels
    if index == found.left:
        labels, cached = cached, labels
    axes = dict(zip(cached, trace.axes, strict=True))
    width = {label for label in cached if label not in labels or label in found.summed}
    are_unique = len(axes) == len(cached) and len({*labels}) == len(labels)
    if not are_unique or len(width) != 2 or len(found.summed) != 1 or not found.summed < width:
        return None
    if {axes[label] for label in width} != {(SEQUENCE,), (HEAD_DIM,)} or not found.summed <= {*labels}:
        return None
    shared = {label: names for label, names in axes.items() if label not in width and names}
    shared |= dict.fromkeys(width, (_WIDTH,))
    sides = [
        _parts(zip(*side, strict=True), shared, trace) for side in ((labels, queries), (found.result_labels, result))
    ]
    if sides[0] is None or sides[1] is None:
        return None
    (summed,) = found.summed
    return GroupedProduct(queries=sides[0], result=sides[1], sums_tokens=axes[summed] == (SEQUENCE,))


def _parts(axes: Iterable[tuple[str, Dimension]], shared: dict[str, Labels], trace: LayoutTrace) -> Parts | None:
    """Return the dimensions on some axes, given as label and size; None if one of the cache is missing."""
    parts: list[tuple[str, Dimension]] = []
    for label, size in axes:
        names = shared.get(label, (f"{_ROWS}.{label}",))
        sizes = [trace.sizes.get(name, size) for name in names]
        if not dim.is_equal(dim.product(sizes), size):
            return None  # of queries that are broadcast
        parts += zip(names, sizes, strict=True)
    return tuple(part for part in parts if part[1] != 1 or part[0] == _WIDTH)
