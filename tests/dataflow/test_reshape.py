"""The sequence axis after a reshape: in row-major order the sizes before and after it are enough."""

import pytest

from kvsurgeon.symbolic.dimension import BATCH as B
from kvsurgeon.symbolic.dimension import LENGTH as N
from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable, SequenceAxis, reshape_axes

STREAM = LengthVariable(Length.NEW)

TRACED = [
    # before, (axis, outer, inner), after, (axis, outer, inner)
    ("split features into heads", (B, N, 8), (1, 1, 1), (B, N, 2, 4), (1, 1, 1)),
    ("merge heads", (B, N, 2, 4), (1, 1, 1), (B, N, 8), (1, 1, 1)),
    ("merge batch and tokens", (B, N, 8), (1, 1, 1), (B * N, 8), (0, B, 1)),
    ("part batch and tokens", (B * N, 8), (0, B, 1), (B, N, 8), (1, 1, 1)),
    ("merge batch and heads next to the tokens", (B, 2, N, 4), (2, 1, 1), (2 * B, N, 4), (1, 1, 1)),
    ("merge tokens and heads", (B, N, 2, 4), (1, 1, 1), (B, 2 * N, 4), (1, 1, 2)),
    ("part tokens and heads", (B, 2 * N, 4), (1, 1, 2), (B, N, 2, 4), (1, 1, 1)),
    ("all on one axis", (B, N, 8), (1, 1, 1), (8 * B * N,), (0, B, 8)),
    ("an axis of size 1 before", (B, N, 8), (1, 1, 1), (1, B, N, 8), (2, 1, 1)),
    ("an axis of size 1 gone", (1, B, N, 8), (2, 1, 1), (B, N, 8), (1, 1, 1)),
    ("nothing next to the tokens", (N,), (0, 1, 1), (N, 1), (0, 1, 1)),
    ("copies outside the tokens", (B, 2 * N, 4), (1, 2, 1), (B, 2, N, 4), (2, 1, 1)),
]


@pytest.mark.parametrize(("before", "axis", "after", "expected"), [pytest.param(*c[1:], id=c[0]) for c in TRACED])
def test_the_sequence_axis_is_traced(before, axis, after, expected):
    place, outer, inner = axis
    (found,) = reshape_axes((SequenceAxis(place, STREAM, outer, inner),), before, after, N)
    assert (found.axis, found.outer, found.inner) == expected
    assert found.variable is STREAM


UNTRACEABLE = [
    ("the tokens are cut in two", (B, N, 8), (1, 1, 1), (B, N / 2, 16)),
    ("tokens merge with half of the features", (B, N, 6), (1, 1, 1), (B, 4 * N, 2)),
    ("the batch is parted by the tokens' number", (B * N, 8), (0, B, 1), (N, B, 8)),
]


@pytest.mark.parametrize(("before", "axis", "after"), [pytest.param(*c[1:], id=c[0]) for c in UNTRACEABLE])
def test_the_sequence_axis_cannot_be_traced(before, axis, after):
    place, outer, inner = axis
    assert reshape_axes((SequenceAxis(place, STREAM, outer, inner),), before, after, N) is None


def test_two_axes_stay_two():
    query, key = SequenceAxis(2, LengthVariable()), SequenceAxis(3, LengthVariable())
    found = reshape_axes((query, key), (B, 2, N, N), (2 * B, N, N), N)
    assert [axis.axis for axis in found] == [1, 2]
    assert reshape_axes((query, key), (B, 2, N, N), (2 * B, N * N), N) is None


def test_a_fixed_length_is_followed_alike():
    (found,) = reshape_axes((SequenceAxis(1, STREAM),), (2, 6, 8), (12, 8), 6)
    assert (found.axis, found.outer, found.inner) == (0, 2, 1)


def test_roles_that_agree_share_what_is_learnt():
    first, second = LengthVariable(at="scores"), LengthVariable(at="scores")
    assert first.agree(second)
    first.root().length = Length.TOTAL
    assert second.resolved() is Length.TOTAL
    assert not second.agree(LengthVariable(Length.NEW))
    assert second.agree(LengthVariable(Length.TOTAL))
