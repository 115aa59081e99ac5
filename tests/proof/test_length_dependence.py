"""Where the total length enters context: as an extent, which proves prefix stability, or as a value."""

# ruff: noqa: E501  # a case is read best on one line

import math

import pytest
from attentions import attention
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject

EXTENT = [
    ("a mask of positions", attention()),
    ("a triangle of ones", attention(constants="int64 main = {0}", allowed=
     "n1 = Unsqueeze(length, first)\n shape = Concat<axis = 0>(n1, n1)\n ones = ConstantOfShape<value = float[1] {1}>(shape)\n"
     "low_half = Trilu<upper = 0>(ones, main)\n allowed = Cast<to = 9>(low_half)")),
    ("a table that is sliced", attention(constants="float[500, 8] table, float[1, 400, 400] m, float none = {0.5}",
     hidden="n1 = Unsqueeze(length, first)\n p = Slice(table, first, n1, first)\n h = Add(x, p)")),
    ("a table that is looked up", attention(constants="float[500, 8] table", hidden="p = Gather(table, at)\n h = Add(x, p)")),
    ("all positions, counted from the end", attention(constants="float[500, 8] table, int64[1] end = {9000000000}", hidden=
     "n0 = Neg(length)\n n1 = Unsqueeze(n0, first)\n some = Slice(at, n1, end, first)\n p = Gather(table, some)\n h = Add(x, p)")),
    ("positions that are counted", attention(constants="float[500, 8] table, int64 axis = {0}", hidden=
     "n1 = Unsqueeze(length, first)\n ones = Expand(one, n1)\n count = CumSum(ones, axis)\n p = Gather(table, count)\n h = Add(x, p)")),
    ("a window", attention(constants="int64 wide = {4096}", allowed=
     "back = Sub(column, row)\n near = Less(back, wide)\n causal = LessOrEqual(row, column)\n allowed = And(near, causal)")),
]  # fmt: skip
VALUE = [
    ("a scale", "scores", "far = Greater(length, limit)\n f = Where(far, half, unit)\n s = Mul(s0, f)"),
    ("a scale of its logarithm", "scores",
     "long = Cast<to = 1>(length)\n l = Log(long)\n far = Greater(l, log_limit)\n f = Where(far, half, unit)\n s = Mul(s0, f)"),
    ("a scale of a square", "scores", "square = Mul(length, length)\n far = Greater(square, limit2)\n f = Where(far, half, unit)\n s = Mul(s0, f)"),
    ("a window that is counted from the end", "allowed", "start = Sub(length, limit)\n late = GreaterOrEqual(row, start)\n"
     "causal = LessOrEqual(row, column)\n allowed = And(late, causal)"),
    ("a shift of what is projected", "hidden", "far = Greater(length, limit)\n f = Where(far, half, unit)\n h = Add(x, f)"),
]  # fmt: skip


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in EXTENT])
def test_as_an_extent_it_changes_nothing(text):
    proof = Subject.of(read(text)).proof()
    assert proof.limit is None
    assert next(one for one in proof.obligations if one.name == "prefix-stable").status == "proved"


@pytest.mark.parametrize("limit", [300, 1000, 3000])
@pytest.mark.parametrize(("place", "written"), [pytest.param(*case[1:], id=case[0]) for case in VALUE])
def test_as_a_value_it_limits_the_length(place, written, limit):
    constants = (
        f"int64 limit = {{{limit}}}, int64 limit2 = {{{limit * limit}}}, "
        f"float log_limit = {{{math.log(limit + 0.5)}}}, float unit = {{1.0}}"
    )
    proof = Subject.of(read(attention(constants=constants, **{place: written}))).proof()
    assert proof.limit == limit
    assert next(one for one in proof.obligations if one.name == "prefix-stable").status == "measured"


@pytest.mark.parametrize("first", [700, 5000])
def test_a_block_of_late_tokens_that_attend_to_each_other_limits_the_length(first):
    allowed = (
        "causal = LessOrEqual(row, column)\n a = GreaterOrEqual(row, start)\n b = GreaterOrEqual(column, start)\n"
        "c1 = Less(row, end)\n d = Less(column, end)\n ab = And(a, b)\n cd = And(c1, d)\n block = And(ab, cd)\n"
        "allowed = Or(causal, block)"
    )
    text = attention(constants=f"int64 start = {{{first}}}, int64 end = {{{first + 100}}}", allowed=allowed)
    assert Subject.of(read(text)).proof().limit == first + 1


def test_a_value_that_changes_at_short_lengths_is_rejected():
    written = "far = Greater(length, limit)\n f = Where(far, half, unit)\n s = Mul(s0, f)"
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        Subject.of(read(attention(constants="int64 limit = {40}, float unit = {1.0}", scores=written))).proof()
