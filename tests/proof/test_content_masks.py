"""A mask that is computed from the tokens must leave every query a key."""

from __future__ import annotations

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from laws import assert_law
from onnx import numpy_helper
from written import read

from kvsurgeon.errors import Code, UnsupportedError

SHOWN = "feature = Gather<axis = 2>(x, nought)\n shown = Greater(feature, zero)\n own = Unsqueeze(shown, second)"
CAUSAL = "causal = LessOrEqual(row, column)"


def allowing(allowed: str) -> str:
    """The text of a decoder in which tokens with a negative first feature hide their keys."""
    return attention(allowed=f"{SHOWN}\n {CAUSAL}\n {allowed}", constants="float zero = {0.0}")


def adding(to_add: str) -> str:
    """The text of a decoder that adds `own [b, 1, n]` to its scores."""
    masked = f"feature = Gather<axis = 2>(x, nought)\n {to_add}\n hidden = Where(allowed, s, low)\n own = "
    masked += "Unsqueeze(added, second)\n masked_scores = Add(hidden, own)"
    return attention(masked=masked, constants="float zero = {0.0}, float unit = {1.0}")


@pytest.mark.parametrize(
    "text",
    [
        allowing("allowed = And(causal, own)"),
        adding(
            "shown = Greater(feature, zero)\n kept = Cast<to = 1>(shown)\n"
            " left = Sub(unit, kept)\n added = Mul(left, low)"
        ),
        adding("shown = Greater(feature, zero)\n added = Where(shown, zero, low)"),
        adding("kept = Clip(feature, zero, unit)\n left = Sub(unit, kept)\n added = Mul(left, low)"),
        adding(
            "shown = Greater(feature, zero)\n beyond = Greater(feature, unit)\n"
            " inner = Where(beyond, zero, low)\n added = Where(shown, inner, zero)"
        ),
    ],
    ids=["and", "sub", "where", "clip", "two conditions"],
)
def test_a_query_that_may_have_no_key_is_rejected(text):
    with pytest.raises(UnsupportedError, match="computed from the tokens") as caught:
        injected(in_order(read(text)))
    assert caught.value.code is Code.TOKEN_DEPENDENT_MASK


@pytest.mark.parametrize(
    "text",
    [
        allowing("same = Equal(row, column)\n either = Or(own, same)\n allowed = And(causal, either)"),
        adding("shown = Greater(feature, zero)\n added = Where(shown, zero, half)"),
        adding("added = Mul(feature, half)"),
    ],
    ids=["itself", "small", "bias"],
)
def test_a_query_that_always_has_a_key_is_right(text):
    assert_law_of(text)


def test_a_large_table_of_biases_that_tokens_index_may_hide_keys():
    text = "size = Abs(feature)\n near = Min(size, unit)\n place = Cast<to = 7>(near)\n added = Gather(biases, place)"
    model = in_order(read(adding(text).replace("float unit", "float[5000] biases, float unit")))
    biases = next(tensor for tensor in model.graph.initializer if tensor.name == "biases")
    numbers = numpy_helper.to_array(biases).copy()
    assert_law(model, injected(model))
    numbers[0] = -10000.0
    biases.CopyFrom(numpy_helper.from_array(numbers, "biases"))
    with pytest.raises(UnsupportedError, match="computed from the tokens"):
        injected(model)


@pytest.mark.parametrize("number", [200, 2000])
def test_a_score_beyond_a_number_must_not_open_its_key(number):
    opened = "beyond = Greater(s, large)\n either = Or(allowed, beyond)\n masked_scores = Where(either, s, low)"
    with pytest.raises(UnsupportedError, match="attention is not causal"):
        injected(in_order(read(attention(masked=opened, constants=f"float large = {{{number}.0}}"))))


def test_a_product_of_integers_beyond_a_number_must_not_open_its_key():
    opened = "near = Gather<axis = 2>(x, nought)\n whole = Cast<to = 7>(near)\n by_key = Unsqueeze(whole, second)\n"
    opened += "by_query = Unsqueeze(whole, third)\n both = Mul(by_query, by_key)\n beyond = Greater(both, large)"
    opened += "\n causal = LessOrEqual(row, column)\n allowed = Or(causal, beyond)"
    with pytest.raises(UnsupportedError, match="attention is not causal"):
        injected(in_order(read(attention(allowed=opened, constants="int64 large = {70000}"))))


def test_scores_with_a_floor_are_right():
    floor = "beyond = Less(s, small)\n bounded = Where(beyond, small, s)\n masked_scores = Where(allowed, bounded, low)"
    assert_law_of(attention(masked=floor, constants="float small = {-100.0}"))


WHOLE = "near = Gather<axis = 2>(x, nought)\n whole = Cast<to = 7>(near)\n by_key = Unsqueeze(whole, second)\n"
WHOLE += "by_query = Unsqueeze(whole, third)\n both = Mul(by_query, by_key)\n causal = LessOrEqual(row, column)"
WORDS = "int64 number = {7000}, int64 next = {7002}, int64[9] table = {0, 0, 0, 0, 0, 0, 1, 0, 0}"


@pytest.mark.parametrize(
    "here",
    ["here = Equal(both, number)",
     "above = Less(number, both)\n below = Less(both, next)\n here = And(above, below)",
     "rest = Mod(both, number)\n here = Equal(rest, one)",
     "place = Clip(both, nought, one)\n found = Gather(table, place)\n here = Cast<to = 9>(found)"],
    ids=["equal", "between", "remainder", "table"],
)  # fmt: skip
def test_a_condition_of_a_query_and_a_key_must_not_open_the_key(here):
    with pytest.raises(UnsupportedError, match="attention is not causal"):
        injected(in_order(read(attention(allowed=f"{WHOLE}\n {here}\n allowed = Or(causal, here)", constants=WORDS))))


def test_a_condition_of_a_query_and_a_key_that_leaves_the_own_key_is_right():
    hidden = "here = Equal(both, number)\n shown = Not(here)\n own = Equal(row, column)\n either = Or(own, shown)"
    assert_law_of(attention(allowed=f"{WHOLE}\n {hidden}\n allowed = And(causal, either)", constants=WORDS))


def test_many_conditions_of_a_key_may_hide_it():
    parts, total = [], ""
    for number in range(8):
        parts.append(f"c{number} = Greater(feature, t{number})\n f{number} = Cast<to = 1>(c{number})")
        total += f"u{number} = Add({f'u{number - 1}' if number else 'zero'}, f{number})\n "
    bump = "gap = Sub(u7, four)\n size = Abs(gap)\n near = Sub(half, size)\n some = Relu(near)\n added = Mul(some, low)"
    text = adding("\n ".join(parts) + f"\n {total}{bump}")
    thresholds = ", ".join(f"float t{number} = {{{number - 4}.0}}" for number in range(8))
    text = text.replace("float unit", f"float four = {{4.0}}, {thresholds}, float unit")
    with pytest.raises(UnsupportedError, match="computed from the tokens"):
        injected(in_order(read(text)))
