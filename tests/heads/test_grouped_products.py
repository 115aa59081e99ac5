"""The KV head that each query head reads: neighbors share one in most models, but not in all."""

from __future__ import annotations

import pytest
from laws import difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.analysis.analysis import analyze
from kvsurgeon.heads.grouped_products import key_heads_read
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa

# 4 query heads, 2 KV heads of 3
TEXT = """
g (int64[batch_size, sequence_length] input_ids) => (float[batch_size, sequence_length, 9] logits)
 <float[9, 8] table, float[8, 12] q_weight, float[8, 6] k_weight, float[8, 6] v_weight, float[12, 9] out,
  int64[5] q_shape = {0, 0, 2, 2, 3}, int64[4] q_flat = {0, 4, -1, 3}, int64[4] k_shape = {0, 0, 2, 3},
  int64[3] flat = {0, 0, 12}, int64[1] place = {PLACE}, int64[4] twice = {1, 2, 1, 1},
  int64[5] apart = {0, 2, 2, -1, 3},
  float low = {-10000}, float none = {0}, int64 zero = {0}, int64 one = {1}, int64[2] column = {-1, 1}>
{
  x = Gather(table, input_ids)
  shape = Shape(input_ids)
  length = Gather(shape, one)
  row = Range(zero, length, one)
  rows = Reshape(row, column)
  visible = LessOrEqual(row, rows)
  mask = Where(visible, none, low)
  q = MatMul(x, q_weight)
  q5 = Reshape(q, q_shape)
  qt = Transpose<perm = [0, 2, 3, 1, 4]>(q5)
  k = MatMul(x, k_weight)
  k4 = Reshape(k, k_shape)
  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
  v = MatMul(x, v_weight)
  v4 = Reshape(v, k_shape)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  MET
  masked = Add(scores, mask)
  weights = Softmax(masked)
  context = MatMul(weights, values)
  c5 = Reshape(context, apart)
  back = Transpose<perm = [0, 3, 1, 2, 4]>(c5)
  joined = Reshape(back, flat)
  logits = MatMul(joined, out)
}
"""
BROADCAST = """
  k5 = Unsqueeze(kt, place)
  kx = Transpose<perm = [0, 1, 2, 4, 3]>(k5)
  values = Unsqueeze(vt, place)
  scores = MatMul(qt, kx)
"""
TILED = """
  q4 = Reshape(qt, q_flat)
  kr = Tile(kt, twice)
  kx = Transpose<perm = [0, 1, 3, 2]>(kr)
  values = Tile(vt, twice)
  scores = MatMul(q4, kx)
"""
CASES = [
    ("neighbors share", BROADCAST, 2, (0, 0, 1, 1)),
    ("interleaved", BROADCAST, 1, (0, 1, 0, 1)),
    ("tiled", TILED, 1, (0, 1, 0, 1)),
]


def logits(subject):
    proto = io.to_proto(subject.model)
    return in_onnxruntime(proto)(texts(proto))["logits"]


@pytest.mark.parametrize(("met", "place", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_the_order_of_heads_is_found_in_the_products(met, place, expected):
    given = Subject.of(read(TEXT.replace("MET", met).replace("PLACE", str(place))))
    before = logits(given)

    assert key_heads_read(analyze(given.model), 0) == expected

    ExpandGqa().apply(given)
    assert key_heads_read(analyze(given.model), 0) == (0, 1, 2, 3)
    assert difference(logits(given), before) < 1e-5
