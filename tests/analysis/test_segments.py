"""Masks of segments: queries attend to keys with an equal number, counted or computed from the tokens."""

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from written import read

from kvsurgeon.errors import UnsupportedError

MARKS = "g = Gather<axis = 2>(x, nought)\n p = Greater(g, nil)\n c9 = Cast<to = 7>(p)\n"
COUNTED = f"{MARKS} n9 = CumSum(c9, one)\n"
KINDS = f"{MARKS} n9 = Identity(c9)\n"
SIDES = "rows9 = Unsqueeze(n9, third)\n columns9 = Unsqueeze(n9, second)\n"
CAUSAL = "past = LessOrEqual(row, column)\n"


def segments(numbers: str, allowed: str) -> str:
    return attention(allowed=f"{numbers}{SIDES}{CAUSAL}{allowed}", constants="float nil = {0.0}")


@pytest.mark.parametrize("numbers", [COUNTED, KINDS], ids=["counted", "of the token alone"])
@pytest.mark.parametrize(
    "allowed",
    ["same = Equal(rows9, columns9)\n allowed = And(past, same)",
     "same = Equal(columns9, rows9)\n allowed = And(same, past)",
     "other = GreaterOrEqual(rows9, columns9)\n allowed = And(past, other)"],
    ids=["equal", "equal, the other way", "not in a later segment"],
)  # fmt: skip
def test_segments_and_earlier_keys(numbers, allowed):
    assert_law_of(segments(numbers, allowed))


@pytest.mark.parametrize(
    "allowed",
    ["allowed = Equal(rows9, columns9)", "same = Equal(rows9, columns9)\n allowed = Or(past, same)",
     "same = Equal(rows9, columns9)\n other = Not(same)\n allowed = And(past, other)"],
    ids=["all of the segment", "earlier keys and the segment", "other segments"],
)  # fmt: skip
@pytest.mark.parametrize("numbers", [COUNTED, KINDS], ids=["counted", "of the token alone"])
def test_segments_with_later_keys_or_without_any_are_rejected(numbers, allowed):
    with pytest.raises(UnsupportedError):
        injected(in_order(read(segments(numbers, allowed))))


def test_segments_that_are_compared_with_a_number_are_rejected():
    late = "high = Greater(columns9, many)\n same = Equal(rows9, columns9)\n both = And(same, high)\n"
    text = segments(COUNTED, f"{late} allowed = Or(past, both)").replace("float nil", "int64 many = {777}, float nil")
    with pytest.raises(UnsupportedError, match="with numbers"):
        injected(in_order(read(text)))


def test_layers_that_share_the_mask_of_segments():
    again = """k2 = MatMul(c, wk)
 t2 = Transpose<perm = [0, 2, 1]>(k2)
 q2 = MatMul(c, wq)
 s2 = MatMul(q2, t2)
 m2 = Where(allowed, s2, low)
 w2 = Softmax<axis = -1>(m2)
 v2 = MatMul(c, wv)
 logits = MatMul(w2, v2)"""
    allowed = f"{COUNTED}{SIDES}{CAUSAL} same = Equal(rows9, columns9)\n allowed = And(past, same)"
    assert_law_of(attention(allowed=allowed, constants="float nil = {0.0}", after=again))
