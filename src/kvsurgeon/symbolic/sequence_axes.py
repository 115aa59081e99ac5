"""Sequence axes: where in a tensor the tokens lie, and which of the two lengths an axis will have.

An axis may hold more than the tokens: [batch * length, hidden] has `outer = batch`, [batch, length * heads, head_dim]
has `inner = heads`. Row-major order makes that enough to follow tokens through any reshape: what lies to the left and
to the right of them stays the same.

Rows of the model's own may stand before and rows_after the tokens: keys that were learnt, attention sinks. They are a
learned_rows of the axis, [batch, rows_before + length + rows_after, hidden].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from kvsurgeon.symbolic import dimension as dim
from kvsurgeon.symbolic.dimension import Dimension


class Length(Enum):
    """The two lengths of a cached decoder."""

    NEW = "sequence_length"  # S: the tokens given now
    TOTAL = "total_sequence_length"  # T = P + S: all tokens so far


@dataclass(eq=False, slots=True)
class LengthVariable:
    """Which length a set of axes has; axes that must agree share a variable (union-find).

    The stream of tokens has the new length. Where two sequence axes meet in one tensor each of them gets an open variable,
    and the product that sums one of them away tells which is the keys'.
    """

    length: Length | None = None
    at: str = ""  # the value at which the variable arose
    bias: bool = False  # arose where context brought an axis of its own
    parent: LengthVariable | None = None
    mixed_at: list[str] = field(default_factory=list)  # values that are right only if it becomes TOTAL

    def root(self) -> LengthVariable:
        """The variable that stands for all that agree with this one."""
        variable = self
        while variable.parent is not None:
            variable = variable.parent
        return variable

    def resolved(self) -> Length | None:
        """The length, where it is decided."""
        return self.root().length

    def agree(self, other: LengthVariable) -> bool:
        """Make two open roles one, or decide an open one as the other is; False where both are decided and differ."""
        mine, theirs = self.root(), other.root()
        if mine is theirs:
            return True
        if mine.length is not None or theirs.length is not None:  # of another attention: each has keys of its own
            mine.length, theirs.length = mine.length or theirs.length, theirs.length or mine.length
            return mine.length is theirs.length
        if mine.bias:
            mine, theirs = theirs, mine
        theirs.parent = mine
        mine.mixed_at += theirs.mixed_at
        return True


@dataclass(frozen=True, slots=True)
class SequenceAxis:
    """One axis that holds tokens: its size is outer * (rows_before + length + rows_after) * inner."""

    axis: int
    variable: LengthVariable
    outer: Dimension = 1
    inner: Dimension = 1
    rows_before: int = 0  # rows of the model's own before the tokens
    rows_after: int = 0  # and after them

    def at(self, axis: int) -> SequenceAxis:
        """The same tokens on another axis."""
        return self if axis == self.axis else replace(self, axis=axis)

    def with_variable(self, variable: LengthVariable) -> SequenceAxis:
        """The same axis in another variable."""
        return replace(self, variable=variable)

    def with_rows(self, rows_before: int, rows_after: int) -> SequenceAxis:
        """The same axis with so many more rows beside the tokens, or with fewer."""
        return replace(self, rows_before=self.rows_before + rows_before, rows_after=self.rows_after + rows_after)

    @property
    def is_plain(self) -> bool:
        """Whether the axis holds the tokens and nothing else."""
        return self.outer == 1 and self.inner == 1 and not self.learned_rows

    @property
    def learned_rows(self) -> int:
        """How many rows of the model's own stand beside the tokens."""
        return self.rows_before + self.rows_after

    @property
    def without_rows(self) -> SequenceAxis:
        """The axis without the rows that stand beside the tokens."""
        return replace(self, rows_before=0, rows_after=0) if self.learned_rows else self

    def size(self, length: Dimension) -> Dimension:
        """Its size where there are so many tokens."""
        return dim.multiply(dim.multiply(self.outer, self.inner), dim.add(length, self.learned_rows))


Axes = tuple[SequenceAxis, ...]


def reshape_axes(
    axes: Axes, before: tuple[Dimension, ...], after: tuple[Dimension, ...], length: Dimension
) -> Axes | None:
    """Return where the tokens lie after a row-major reshape; None where an axis would be cut in two."""
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
            found = replace(axis, axis=place, outer=outer, inner=inner)
            if dim.is_equal(found.size(length), size):
                return found
        before_place = dim.multiply(before_place, size)
    return None
