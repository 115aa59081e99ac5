"""The axis that holds heads, described as a sequence axis is: outer * count * inner.

`[batch * heads, length, head_dim]` holds them with `outer = batch`, `[batch, length, heads * head_dim]` with
`inner = head_dim`. Row-major order makes that enough to find them again before a reshape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension
from kvsurgeon.symbolic.sequence_axes import LengthVariable, SequenceAxis, follow_reshape


@dataclass(frozen=True, slots=True)
class HeadAxis:
    """One axis that holds heads: its size is outer * count * inner."""

    axis: int
    count: int
    outer: Dimension = 1
    inner: Dimension = 1

    @property
    def size(self) -> Dimension:
        """The size of the axis."""
        return self.sized(self.count)

    def sized(self, count: int) -> Dimension:
        """The size of the axis with so many heads."""
        return dim.multiply(dim.multiply(self.outer, self.inner), count)

    def at(self, axis: int) -> HeadAxis:
        """The same heads on another axis."""
        return replace(self, axis=axis)

    def before_reshape(self, before: Sequence[Dimension], after: Sequence[Dimension]) -> HeadAxis | None:
        """Where the heads lay before a row-major reshape; None where no axis holds them."""
        if self.count == 1:
            return self._single(before, after)
        mine = SequenceAxis(self.axis, LengthVariable(), self.outer, self.inner)
        found = follow_reshape((mine,), tuple(after), tuple(before), self.count)
        if not found:
            return None
        return HeadAxis(found[0].axis, self.count, found[0].outer, found[0].inner)

    def _single(self, before: Sequence[Dimension], after: Sequence[Dimension]) -> HeadAxis | None:
        """A single head can be anywhere: it is where the axis around it lies, if that stays an axis.

        Of several axes of 1 side by side it is the last: a batch that is fixed to 1 stands before heads.
        """
        left, right = dim.product(after[: self.axis]), dim.product(after[self.axis + 1 :])
        for place, size in reversed(list(enumerate(before))):
            around = ((size, after[self.axis]), (dim.product(before[:place]), left),
                      (dim.product(before[place + 1 :]), right))  # fmt: skip
            if all(dim.is_equal(mine, theirs) for mine, theirs in around):
                return self.at(place)
        return None
