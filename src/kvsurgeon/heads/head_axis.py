"""The axis that holds heads, as `outer * count * inner` elements.

`[batch * heads, length, head_dim]` holds them with `outer = batch`, `[batch, length, heads * head_dim]` with
`inner = head_dim`. In row-major order that is enough to find them before a reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import LengthVariable, SequenceAxis, reshape_axes


@dataclass(frozen=True, slots=True)
class HeadAxis:
    """One axis of a tensor that holds heads.

    Attributes:
        axis: Index of the axis.
        count: Number of heads.
        outer: Product of the dimensions on the axis before the heads.
        inner: Product of the dimensions on the axis after the heads.
    """

    axis: int
    count: int
    outer: Dimension = 1
    inner: Dimension = 1

    @property
    def size(self) -> Dimension:
        """Size of the axis."""
        return self.sized(self.count)

    def sized(self, count: int) -> Dimension:
        """Return the size of the axis with another number of heads."""
        return dim.multiply(dim.multiply(self.outer, self.inner), count)

    def at(self, axis: int) -> HeadAxis:
        """Return the same heads on another axis."""
        return replace(self, axis=axis)

    def before_reshape(self, before: Sequence[Dimension], after: Sequence[Dimension]) -> HeadAxis | None:
        """Return the axis of the heads before a row-major reshape; None if no axis holds them all."""
        if self.count == 1:
            return self._single(before, after)
        mine = SequenceAxis(self.axis, LengthVariable(), self.outer, self.inner)
        found = reshape_axes((mine,), tuple(after), tuple(before), self.count)
        return HeadAxis(found[0].axis, self.count, found[0].outer, found[0].inner) if found else None

    def _single(self, before: Sequence[Dimension], after: Sequence[Dimension]) -> HeadAxis | None:
        """The axis of a single head: the one that the reshape keeps, with the same sizes before and behind it.

        Of several neighboring axes of size 1 it is the last: a batch that is fixed to 1 comes before the heads.
        """
        wanted = (after[self.axis], dim.product(after[: self.axis]), dim.product(after[self.axis + 1 :]))
        for axis in reversed(range(len(before))):
            sizes = (before[axis], dim.product(before[:axis]), dim.product(before[axis + 1 :]))
            if all(dim.is_equal(one, other) for one, other in zip(sizes, wanted, strict=True)):
                return self.at(axis)
        return None
