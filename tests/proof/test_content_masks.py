"""A mask that is computed from the tokens must leave every query a key."""

from __future__ import annotations

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
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
    ],
    ids=["and", "sub", "where", "clip"],
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
