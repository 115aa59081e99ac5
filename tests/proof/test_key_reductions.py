"""Whatever reads scores along the axis of the keys must not see a later key, at any length and magnitude."""

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from written import read

from kvsurgeon.errors import UnsupportedError

NUMBERS = "int64[1] minus = {-1}, int64 far = {700}, float nil = {0.0}, float huge = {100000.0}"
PLACES = """z = Mul(column, nought)
 here = Add(row, z)
 there = {0}
 inside = {1}
 index = Where(inside, there, here)
 index3 = Unsqueeze(index, first)
 all = Shape(s0)
 indices = Expand(index3, all)
 """
AHEAD = PLACES.format("Add(here, far)", "Less(there, length)") + "s = GatherElements<axis = 2>(s0, indices)"
BACK = PLACES.format("Sub(here, far)", "LessOrEqual(nought, there)") + "w = GatherElements<axis = 2>(w0, indices)"
BY_MATRIX = """d = Sub(column, row)
 moved = Equal(d, far)
 matrix = Cast<to = 1>(moved)
 others = MatMul(s0, matrix)
 s = Add(s0, others)"""
HUGE = "most = ReduceMax(s0, minus)\n beyond = Greater(most, huge)\n s = Where(beyond, nil, s0)"


@pytest.mark.parametrize("scores", [AHEAD, BY_MATRIX, HUGE], ids=["by index", "by a matrix", "a huge maximum"])
def test_scores_of_later_keys_are_rejected_at_any_distance_and_magnitude(scores):
    with pytest.raises(UnsupportedError, match="reads the scores of later keys"):
        injected(in_order(read(attention(scores=scores, constants=NUMBERS))))


def test_weights_that_are_moved_farther_than_is_run_are_rejected():
    text = (
        attention(constants=NUMBERS)
        .replace("w = Softmax", "w0 = Softmax")
        .replace("c = MatMul", f"{BACK}\n c = MatMul")
    )
    with pytest.raises(UnsupportedError, match="selected by position"):
        injected(in_order(read(text)))


NORMALIZED = """w0 = Softmax<axis = -1>(s)
 mask = Cast<to = 1>(allowed)
 w1 = Mul(w0, mask)
 total = ReduceSum(w1, minus)
 {}"""


@pytest.mark.parametrize("size", ["[b, n, 8]", "[1, 9, 8]"], ids=["any length", "a fixed length"])
def test_a_softmax_before_the_mask_must_be_normalized_again(size):
    """The sum over later keys cancels then."""
    parts = (
        "w = Div(w1, total)",
        "half_total = Mul(total, half)\n same = Div(half_total, half_total)\n w = Mul(w1, same)",
    )
    again, never = (
        attention(masked=NORMALIZED.format(part), constants=NUMBERS)
        .replace("w = Softmax<axis = -1>(masked_scores)", "")
        .replace("[b, n, 8]", size)
        for part in parts
    )
    assert injected(in_order(read(again))).graph.input[1].name == "past_key_values.0.key"
    with pytest.raises(UnsupportedError, match="a KV cache would change the result"):
        injected(in_order(read(never)))


def of_masked(reduction: str) -> str:
    masked = f"some = Where(allowed, s, low)\n bound = {reduction}(some, minus)\n masked_scores = Sub(some, bound)"
    return attention(masked=masked, constants=NUMBERS)


def test_a_maximum_of_masked_scores_is_accepted():
    assert_law_of(of_masked("ReduceMax"))


def test_at_a_fixed_length_a_minimum_of_masked_scores_is_rejected():
    """It tells whether a query has later keys; the maximum does not."""
    fixed = {name: of_masked(name).replace("[b, n, 8]", "[1, 9, 8]") for name in ("ReduceMax", "ReduceMin")}
    huge = fixed["ReduceMin"].replace("low = {-10000.0}", "low = {-3.4e38}")
    original = in_order(read(fixed["ReduceMax"]))
    assert injected(original).graph.input[1].name == "past_key_values.0.key"
    with pytest.raises(UnsupportedError, match="changes with the number of later keys"):
        injected(in_order(read(huge)))
