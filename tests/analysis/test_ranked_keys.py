"""Attention to the largest scores of a query, as many as there are up to a bound: thresholds, and an indexer."""

# ruff: noqa: E501  # a case is read best on one line

import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from written import read

from kvsurgeon.errors import UnsupportedError

CONSTANTS = """int64[1] few = {BOUND}, int64 minus = {-1}, int64[1] minus1 = {-1}, int64[1] end = {4611686018427387904},
 float[8, 4] wi, float[8, 4] wj, float[1] nil = {0.0}, float[1] hide = {-10000.0}"""
COUNT = "m0 = Where(allowed, s, low)\n n1 = Unsqueeze(length, first)\n count = Min(n1, few)\n"
THRESHOLD = "under = Less(m0, t)\n masked_scores = Where(under, low, m0)"

# from the masked scores m0 or others `ranked` to masked_scores
KINDS = {
    "the last rank by Slice": f"r, at0 = TopK<axis = -1>(RANKED, count)\n t = Slice(r, minus1, end, third)\n {THRESHOLD}",
    "the last rank by Gather": f"r, at0 = TopK<axis = 2>(RANKED, count)\n g = Gather<axis = 2>(r, minus)\n"
    f"t = Unsqueeze(g, third)\n {THRESHOLD}",
    "scores at the ranked places": "r, at0 = TopK<axis = -1>(RANKED, count)\n g = GatherElements<axis = 2>(m0, at0)\n"
    f"t = ReduceMin(g, third)\n {THRESHOLD}",
    "an indexer": """iq = MatMul(h, wi)
      ik = MatMul(h, wj)
      ikt = Transpose<perm = [0, 2, 1]>(ik)
      i0 = MatMul(iq, ikt)
      i1 = Relu(i0)
      i2 = INDEXED
      r, at0 = TopK<axis = -1>(i2, count)
      b1 = Slice(sizes, first, second)
      all = Concat<axis = 0>(b1, n1, n1)
      others = Expand(hide, all)
      chosen = Shape(at0)
      nils = Expand(nil, chosen)
      added = ScatterElements<axis = -1>(others, at0, nils)
      masked_scores = Add(m0, added)""",
}  # fmt: skip


def ranked(kind: str, bound: int, *, masked: bool) -> str:
    body = KINDS[kind].replace("RANKED", "m0" if masked else "s")
    body = body.replace("INDEXED", "Where(allowed, i1, low)" if masked else "Identity(i1)")
    return attention(constants=CONSTANTS.replace("BOUND", str(bound)), masked=COUNT + body)


@pytest.mark.parametrize(
    ("kind", "bound"), [*((kind, 5) for kind in KINDS), ("the last rank by Slice", 1), ("an indexer", 300)]
)
def test_masked_scores_are_ranked(kind, bound):
    assert_law_of(ranked(kind, bound, masked=True))


@pytest.mark.parametrize("bound", [5, 700])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_later_keys_are_not_ranked(kind, bound):
    with pytest.raises(UnsupportedError):
        injected(in_order(read(ranked(kind, bound, masked=False))))


def test_ranks_of_tokens_are_no_ranks_of_keys():
    hidden = "n1 = Unsqueeze(length, first)\n count = Min(n1, few)\n r, at0 = TopK<axis = 1>(x, count)\n m = ReduceMax(r, second)\n h = Add(x, m)"
    with pytest.raises(UnsupportedError, match="mixes tokens"):
        injected(in_order(read(attention(constants="int64[1] few = {5}", hidden=hidden))))
