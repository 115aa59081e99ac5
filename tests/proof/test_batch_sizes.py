"""Attention of every number of sequences is causal and prefix stable, or the model is refused."""

from __future__ import annotations

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from written import read

from kvsurgeon.errors import Code, UnsupportedError

CAUSAL = "causal = LessOrEqual(row, column)\n sequences = Gather(sizes, nought)"


def opened(here: str, constants: str) -> str:
    """Return the text of a decoder whose attention is not causal if `here`, which is computed from `sequences`."""
    return attention(allowed=f"{CAUSAL}\n {here}\n allowed = Or(causal, here)", constants=constants)


def test_a_factor_of_the_length_in_larger_batches_is_rejected():
    factor = "sequences = Gather(sizes, nought)\n many = Greater(sequences, four)\n long = Cast<to = 1>(length)\n"
    factor += "share = Mul(long, half)\n factor = Where(many, share, half)\n s = Mul(s0, factor)"
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        injected(in_order(read(attention(scores=factor, constants="int64 four = {4}"))))


@pytest.mark.parametrize(
    ("here", "constants"),
    [
        ("here = Greater(sequences, many)", "int64 many = {20}"),
        ("here = Equal(sequences, many)", "int64 many = {5000}"),
        ("tens = Div(sequences, ten)\n here = Greater(tens, ten)", "int64 ten = {10}"),
        ("real = Cast<to = 1>(sequences)\n root = Sqrt(real)\n here = Greater(root, four)", "float four = {4.5}"),
        ("less = Sub(sequences, many)\n here = Greater(less, nought)", "int64 many = {20}"),
        ("place = Min(sequences, most)\n number = Gather(table, place)\n here = Cast<to = 9>(number)",
         "int64 most = {29}, int64[30] table = {" + ", ".join(["0"] * 25 + ["1"] * 5) + "}"),
    ],
    ids=["greater", "equal", "quotient", "root", "difference", "table"],
)  # fmt: skip
def test_a_number_of_sequences_that_is_too_large_to_run_is_rejected(here, constants):
    with pytest.raises(UnsupportedError, match="a number of sequences that is too large to run") as caught:
        injected(in_order(read(opened(here, constants))))
    assert caught.value.code is Code.BATCH_LEAK


@pytest.mark.parametrize(
    "here",
    ["none = Greater(nought, sequences)\n here = And(none, causal)", "here = Equal(sequences, less)"],
    ids=["nought", "negative"],
)
def test_comparisons_with_numbers_that_no_batch_has_are_right(here):
    assert_law_of(opened(here, "int64 less = {-1}"))


def test_a_number_of_masked_tokens_is_no_number_of_sequences():
    padded = "summed = ReduceSum<keepdims = 0>(m, second)\n less = Sub(length, summed)\n many = Greater(less, most)\n"
    padded += "real = Cast<to = 9>(m)\n causal = LessOrEqual(row, column)\n keys = Unsqueeze(real, second)\n"
    padded += "whole = Unsqueeze(many, places)\n near = Greater(row, nought)\n none = And(whole, near)\n"
    padded += "rest = Not(none)\n shown = And(keys, causal)\n either = Or(rest, shown)\n allowed = And(shown, either)"
    constants = "int64 most = {3000}, int64[2] places = {1, 2}"
    assert_law_of(attention(allowed=padded, inputs="int64[b, n] m", constants=constants))
