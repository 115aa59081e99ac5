"""unmerge-heads computes what the merged axes computed, and leaves everything else as it is."""

from __future__ import annotations

import numpy as np
import pytest
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.unmerge_heads import UnmergeHeads

ATTENTION = """case (float[b, n, 8] x) => (float[b, n, 8] y)
<int64[4] split = {{0, -1, 4, 2}}, int64[3] zero = {{0, 0, 8}}, int64[1] four = {{4}}, int64[1] two = {{2}},
 int64[1] minus = {{-1}}, float low = {{-100.0}}, float[1, 1, 1] one = {{0.5}}>
{{
  bs = Shape<start = 0, end = 1>(x) ns = Shape<start = 1, end = 2>(x)
  m = Concat<axis = 0>(minus, ns, two) p = Concat<axis = 0>(bs, four, ns, ns) o = Concat<axis = 0>(bs, four, ns, two)
  r = Reshape(x, split) h = Transpose<perm = [0, 2, 1, 3]>(r) q = Reshape(h, m)
  k = Transpose<perm = [0, 2, 1]>(q) s = MatMul(q, k)
  {scores}
  w = Softmax<axis = {axis}>(t) c = MatMul(w, q)
  apart = Reshape(c, o) back = Transpose<perm = [0, 2, 1, 3]>(apart) y = Reshape(back, zero)
}}"""
SCORES = {
    "nothing": "t = Identity(s)",
    "a number": "t = Mul(s, low)",
    "the same for all heads": "t = Add(one, s)",
    "a mask in rank 4": "a = Reshape(s, p) f = Shape(s) e = Max(a, low) t = Reshape(e, f)",
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_products_and_softmax_have_rank_4_afterwards(scores):
    model = read(ATTENTION.format(scores=scores, axis=-1), 17)
    subject = Subject.of(model)
    assert isinstance(UnmergeHeads().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert sum(node.op_type == "Reshape" for node in result.graph.node) == 2
    for batch, length in ((1, 1), (3, 5)):
        feeds = {"x": np.random.default_rng(0).standard_normal((batch, length, 8)).astype(np.float32)}
        expected, found = (in_onnxruntime(one)(feeds)["y"] for one in (model, result))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert isinstance(UnmergeHeads().apply(subject), Unchanged)


@pytest.mark.parametrize(
    ("scores", "axis"),
    [("t = Identity(s)", 0), ("t = CumSum(s, axis0)", -1), ("t = Transpose<perm = [1, 0, 2]>(s)", -1)],
)
def test_an_operator_along_the_merged_axis_is_unchanged(scores, axis):
    text = ATTENTION.format(scores=scores, axis=axis).replace("float low", "int64 axis0 = {0}, float low")
    assert isinstance(UnmergeHeads().apply(Subject.of(read(text, 17))), Unchanged)
