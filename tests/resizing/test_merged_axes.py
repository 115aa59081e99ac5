"""Context with the tokens of all sequences on one axis, as positions of flattened tokens."""

import pytest
from attentions import CAUSAL, assert_law_of, attention, in_order
from exports import injected
from written import read

from kvsurgeon.errors import UnsupportedError

# Positions of all sequences on one axis [batch * length], from a table of rows by position.
MERGED = """n1 = Unsqueeze(length, first)
 b1 = Slice(sizes, first, second)
 bn = Slice(sizes, first, third)
 PLACES
 xf = Reshape(x, flat)
 hf = Add(xf, pf)
 h = Reshape(hf, sizes)"""
COUNTED = "all = ReduceProd<keepdims = 0>(bn)\n r = Range(nought, all, one)\n m = {}\n pf = Gather(table, m)"
TILED = "pe = Slice(table, first, n1, first)\n times = Concat<axis = 0>(b1, second)\n pf = Tile(pe, times)"


@pytest.mark.parametrize("places", [TILED, COUNTED.format("Mod(r, length)")], ids=["tiled", "counted"])
def test_context_of_all_sequences_on_one_axis(places):
    constants = "float[900, 8] table, int64[2] flat = {-1, 8}"
    assert_law_of(attention(hidden=MERGED.replace("PLACES", places), constants=constants))


@pytest.mark.parametrize("count", ["Div(r, two)", "Mod(r, two)", "Identity(r)"])
def test_places_on_such_an_axis_that_depend_on_the_length_or_not_on_the_position(count):
    constants = "float[900, 8] table, int64[2] flat = {-1, 8}, int64 two = {2}"
    text = attention(hidden=MERGED.replace("PLACES", COUNTED.format(count)), constants=constants)
    with pytest.raises(UnsupportedError):
        injected(in_order(read(text)))


# Two query heads beside each other on the axis of queries: q [b, 2n, 4], one head of keys and values.
FOLDED = {
    "query": "q = Reshape(q0, queries)",
    "key": "k = Slice(k0, first, fourth, third)",
    "value": "v = Slice(v0, first, fourth, third)",
    "allowed": f"""{CAUSAL.replace("allowed", "of_token")}
 of_tokens = Unsqueeze(of_token, second)
 length1 = Unsqueeze(length, first)
 heads_of = Concat<axis = 0>(length1, third, length1)
 repeated = Expand(of_tokens, heads_of)
 rows = Concat<axis = 0>(minus1, length1)
 allowed = Reshape(repeated, rows)
 ones = Cast<to = 1>(allowed)""",
    "after": "logits = Reshape(c, whole)",
}


@pytest.mark.parametrize("exclusive", [0, 1])
def test_a_running_sum_along_an_axis_that_holds_heads_too(exclusive):
    text = attention(
        **FOLDED,
        masked=f"counted = CumSum<exclusive = {exclusive}>(ones, nought)\n distance = Mul(counted, half)\n"
        " biased = Add(s, distance)\n masked_scores = Where(allowed, biased, low)",
        constants="int64[3] queries = {0, -1, 4}, int64[3] whole = {0, -1, 8}, int64[1] fourth = {4}, "
        "int64[1] minus1 = {-1}",
    )
    assert_law_of(text)
