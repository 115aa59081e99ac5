"""Attention that reads more than one tensor of keys and one of values, or lets token data meet the scores."""

import pytest
from attentions import assert_law_of, attention
from exports import injected
from written import read

from kvsurgeon.errors import UnsupportedError

HALVES = """ka, kb = Split<axis = 2, num_outputs = 2>(k)
 qa, qb = Split<axis = 2, num_outputs = 2>(q)
 ta = Transpose<perm = [0, 2, 1]>(ka)
 tb = Transpose<perm = [0, 2, 1]>(kb)
 sa = MatMul(qa, ta)
 sb = MatMul(qb, tb)
 s = Sub(sa, sb)"""
ABSORBED = "vt = Transpose<perm = [0, 2, 1]>(v)\n sv = MatMul(q, vt)\n s = Add(s0, sv)"
SQUARES = """k2 = Mul(k, k)
 sq = ReduceSum(k2, third)
 sr = Transpose<perm = [0, 2, 1]>(sq)
 ss = Sub(s0, sr)
 s = Mul(ss, half)"""
BIAS_OF_VALUES = "vb = ReduceSum(v, third)\n vr = Transpose<perm = [0, 2, 1]>(vb)\n s = Add(s0, vr)"
SPREAD = "n1 = Unsqueeze(length, first)\n one1 = Unsqueeze(one, first)\n to = Concat<axis = 0>(one1, n1, one1)\n"
SPREAD_KEYS = f"""{SPREAD} vb = ReduceSum(v, third)
 vr = Transpose<perm = [0, 2, 1]>(vb)
 ve = Expand(vr, to)
 vm = Where(allowed, ve, low)
 s = Add(s0, vm)"""
KEYS_AT_RELATIVE_PLACES = """d = Sub(column, row)
 m = Add(d, middle)
 r = Gather(table, m)
 z = Einsum<equation = "bkd,qkd->bqk">(k, r)
 s = Add(s0, z)"""
KEYS_OF_PLACES = """p = MatMul(k, places)
 d = Sub(row, column)
 m = Add(d, middle)
 a = Abs(m)
 i = Mod(a, six)
 j = Unsqueeze(i, first)
 bn = Slice(sizes, first, third)
 n1 = Unsqueeze(length, first)
 to = Concat<axis = 0>(bn, n1)
 ji = Expand(j, to)
 g = GatherElements<axis = 2>(p, ji)
 t = Transpose<perm = [0, 2, 1]>(g)
 s = Add(s0, t)"""
CONSTANTS = "float[2000, 8] table, int64 middle = {1000}, float[8, 6] places, int64 six = {6}, int64 two = {2}"
GATE = "g = Sigmoid(q)\n m = ReduceMean(g, third)\n s = Mul(s0, m)"
CACHES = ["past_key_values.0.key", "past_key_values.0.value"]
STATE = "past_key_values.0.state"
SUMMED_UP = BIAS_OF_VALUES.replace("s = Add(s0, vr)", "vc = CumSum(vr, two)\n s = Add(s0, vc)")


def caches(text: str) -> dict[str, int]:
    """Return the number of features of each cached tensor, by name."""
    return {
        value.name: value.type.tensor_type.shape.dim[3].dim_value
        for value in injected(read(text)).graph.input
        if value.name.startswith("past_key_values")
    }


@pytest.mark.parametrize(
    ("scores", "further"),
    [(HALVES, {}), (ABSORBED, {}), (SQUARES, {}), (BIAS_OF_VALUES, {STATE: 1}), (SPREAD_KEYS, {STATE: 1}),
     (KEYS_AT_RELATIVE_PLACES, {}), (KEYS_OF_PLACES, {}), (GATE, {})],
    ids=["halves", "values that are keys too", "squares", "a bias of values", "a bias of values, spread and masked",
         "keys at relative places", "keys of places", "a gate of queries"],
)  # fmt: skip
def test_scores_of_more_than_queries_and_keys(scores, further):
    allowed = "allowed = LessOrEqual(row, column)"
    text = attention(scores=f"{allowed}\n {scores}", allowed="", constants=CONSTANTS)
    assert caches(text) == dict.fromkeys(CACHES, 8) | further
    assert_law_of(text)


def test_a_bias_that_is_summed_up_has_a_state_of_what_is_summed_and_of_sums():
    allowed = "allowed = LessOrEqual(row, column)"
    text = attention(scores=f"{allowed}\n {SUMMED_UP}", allowed="", constants=CONSTANTS)
    assert len(caches(text)) == 4
    assert_law_of(text)


def test_weights_summed_against_several_values():
    text = attention(
        value="v, other = Split<axis = 2, num_outputs = 2>(v0)",
        after="c2 = MatMul(w, other)\n c3 = Neg(c2)\n logits = Concat<axis = 2>(c, c3)",
    )
    assert caches(text) == dict.fromkeys(CACHES, 8)
    assert_law_of(text)


def test_keys_of_two_projections_are_cached_apart():
    scores = """k9 = MatMul(h, wk9)
 t9 = Transpose<perm = [0, 2, 1]>(k9)
 q9 = Slice(q, first, four, third)
 s9 = MatMul(q9, t9)
 s = Mul(s0, s9)"""
    text = attention(hidden="h = Abs(x)", scores=scores, constants="float[8, 4] wk9, int64[1] four = {4}")
    assert caches(text) == dict.fromkeys(CACHES, 8) | {STATE: 4}
    assert_law_of(text)


THE_LARGEST = SPREAD_KEYS.replace("s = Add(s0, vm)", "mx = ReduceMax(ve, third)\n sm = Add(s0, vm)\n s = Mul(sm, mx)")
NORMED = BIAS_OF_VALUES.replace("ReduceSum(v, third)", "ReduceSum(va, third)\n va = LpNormalization<axis = 1>(v)")
TWO_STEPS = SPREAD_KEYS.replace("s = Add", "s = MatMul")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (THE_LARGEST, "total length|not causal"),
        (NORMED, "mixes"),
        (TWO_STEPS, "mixes"),
    ],
    ids=["the largest of all keys", "normed over tokens", "a product of two matrices of weights"],
)
def test_what_lets_tokens_see_later_ones_is_refused(scores, reason):
    allowed = "allowed = LessOrEqual(row, column)"
    with pytest.raises(UnsupportedError, match=reason):
        injected(read(attention(scores=f"{allowed}\n {scores}", allowed="", constants=CONSTANTS)))


def test_two_rows_for_each_position_are_rejected_by_name():
    text = """case (float[b, n, 8] x, float[b, n, 8] y) => (float[b, n, 8] logits)
<int64[1] third = {2}, int64[3] flat = {0, -1, 8}, int64[4] pairs = {0, -1, 2, 8}>
{
  x4 = Unsqueeze(x, third)
  y4 = Unsqueeze(y, third)
  both = Concat<axis = 2>(x4, y4)
  h = Reshape(both, flat)
  ht = Transpose<perm = [0, 2, 1]>(h)
  s = MatMul(h, ht)
  w = Softmax<axis = -1>(s)
  c = MatMul(w, h)
  rows = Reshape(c, pairs)
  logits = ReduceSum<keepdims = 0>(rows, third)
}"""
    with pytest.raises(UnsupportedError, match=r"holds more than the tokens; expected .* found 2\*length"):
        injected(read(text))
