"""Sequence axes: which axes of a tensor hold tokens, and which of the two lengths each has.

An axis may hold more than the tokens: [batch * length, hidden] has `outer = batch`, [batch, length * heads, head_dim]
has `inner = heads`. Row-major order makes that enough to trace the axis through any reshape: the product of the
dimensions on either side of the tokens does not change.

Learned rows may be added before and after the tokens, as attention sinks are:
[batch, rows_before + length + rows_after, hidden]. An axis of the largest of them by rank holds a bounded number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension


class Length(Enum):
    """The two lengths of a cached decoder."""

    NEW = "sequence_length"  # S: the tokens of this call
    TOTAL = "total_sequence_length"  # T = P + S: all tokens up to this call


@dataclass(eq=False, slots=True)
class LengthVariable:
    """The length of a set of axes; axes that must be equally long share a variable (union-find).

    Token data has the new length. If two sequence axes meet in one tensor, each gets an open variable, and the product
    that sums one of them decides which belongs to the keys.

    Attributes:
        length: The length, once it is decided.
        at: Name of the value that introduced the variable.
        bias: Whether context introduced the axis, as a relative position bias does.
        parent: The variable that this one was merged into.
        mixed_at: Names of values that are right only if the length becomes the total one.
    """

    length: Length | None = None
    at: str = ""
    bias: bool = False
    parent: LengthVariable | None = None
    mixed_at: list[str] = field(default_factory=list)

    def root(self) -> LengthVariable:
        """Return the representative of all variables merged with this one."""
        variable = self
        while variable.parent is not None:
            variable = variable.parent
        return variable

    def resolved(self) -> Length | None:
        """Return the length, None if it is not decided."""
        return self.root().length

    def agree(self, other: LengthVariable) -> bool:
        """Merge two open variables, or decide an open one like the other; return False if both differ."""
        mine, theirs = self.root(), other.root()
        if mine is theirs:
            return True
        if mine.length is not None or theirs.length is not None:  # another attention, with other keys
            mine.length, theirs.length = mine.length or theirs.length, theirs.length or mine.length
            return mine.length is theirs.length
        if mine.bias:
            mine, theirs = theirs, mine
        theirs.parent = mine
        mine.mixed_at += theirs.mixed_at
        return True


class SequenceAxis(NamedTuple):
    """One axis that holds tokens: its size is outer * (rows_before + length + rows_after) * inner.

    With `most`, the axis holds at most so many of the tokens, in another order.
    """

    axis: int
    variable: LengthVariable
    outer: Dimension = 1
    inner: Dimension = 1
    rows_before: int = 0  # learned rows before the tokens
    rows_after: int = 0  # learned rows after the tokens
    most: int | None = None

    def at(self, axis: int) -> SequenceAxis:
        """Return the same tokens on another axis."""
        return self if axis == self.axis else self._replace(axis=axis)

    def with_variable(self, variable: LengthVariable) -> SequenceAxis:
        """Return the axis with another length variable."""
        return self._replace(variable=variable)

    def with_rows(self, rows_before: int, rows_after: int) -> SequenceAxis:
        """Return the axis with this many more learned rows, or fewer if negative."""
        return self._replace(rows_before=self.rows_before + rows_before, rows_after=self.rows_after + rows_after)

    @property
    def is_plain(self) -> bool:
        """Whether the axis holds the tokens and nothing else."""
        return self.outer == 1 and self.inner == 1 and not self.learned_rows and self.most is None

    @property
    def learned_rows(self) -> int:
        """Number of learned rows."""
        return self.rows_before + self.rows_after

    @property
    def without_rows(self) -> SequenceAxis:
        """The axis without its learned rows."""
        return self._replace(rows_before=0, rows_after=0) if self.learned_rows else self

    def size(self, length: Dimension) -> Dimension:
        """Return the size of the axis for this number of tokens."""
        count = dim.add(length, self.learned_rows)
        return dim.multiply(
            dim.multiply(self.outer, self.inner), count if self.most is None else dim.minimum(self.most, count)
        )


Axes = tuple[SequenceAxis, ...]


def reshape_axes(
    axes: Axes, before: tuple[Dimension, ...], after: tuple[Dimension, ...], length: Dimension
) -> Axes | None:
    """Return the sequence axes after a row-major reshape; None if one of them would be split."""
    result = []
    for axis in axes:
        left = dim.multiply(dim.product(before[: axis.axis]), axis.outer)
        right = dim.multiply(axis.inner, dim.product(before[axis.axis + 1 :]))
        found = _place(axis, left, right, after, length)
        if found is None:
            return None
        result.append(found)
    if len({axis.axis for axis in result}) < len(result):
        return None
    return tuple(result)


def _place(
    axis: SequenceAxis, left: Dimension, right: Dimension, after: tuple[Dimension, ...], length: Dimension
) -> SequenceAxis | None:
    before_place: Dimension = 1
    for place, size in enumerate(after):
        after_place = dim.product(after[place + 1 :])
        outer, inner = dim.exact_quotient(left, before_place), dim.exact_quotient(right, after_place)
        if outer is not None and inner is not None and size != 1:
            found = axis._replace(axis=place, outer=outer, inner=inner)
            if dim.is_equal(found.size(length), size):
                return found
        before_place = dim.multiply(before_place, size)
    return None
