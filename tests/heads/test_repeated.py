"""Heads that are repeated before something else is done with them: they are followed to where each stands once."""

from __future__ import annotations

import pytest
from laws import assert_law, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.expand_gqa import ExpandGqa
from kvsurgeon.passes.inject import Inject
from kvsurgeon.passes.merge_kv_heads import MergeKvHeads
from kvsurgeon.sequence.analysis import analyse

# 4 query heads, 2 key heads of 4
TEXT = """
g (int64[batch_size, sequence_length] input_ids) => (float[batch_size, sequence_length, 9] logits)
 <float[9, 8] table, float[8, 16] q_weight, float[8, 8] k_weight, float[8, 8] v_weight, float[16, 9] out,
  int64[4] q_shape = {0, 0, 4, 4}, int64[4] k_shape = {0, 0, 2, 4}, int64[3] flat = {0, 0, 16},
  int64[1] two = {2}, int64[5] times = {1, 1, 2, 1, 1}, int64[4] grouped = {0, 4, -1, 4},
  float low = {-10000}, float none = {0}, int64 zero = {0}, int64 one = {1}, int64[2] column = {-1, 1},
  float speed = {0.25}, int64[1] last = {-1}, float step = {0.05}, int8 middle = {0}>
{
  x = Gather(table, input_ids)
  shape = Shape(input_ids)
  length = Gather(shape, one)
  row = Range(zero, length, one)
  rows = Reshape(row, column)
  seen = LessOrEqual(row, rows)
  mask = Where(seen, none, low)
  place = Cast<to = 1>(rows)
  angle = Mul(place, speed)
  cosine = Cos(angle)
  sine = Sin(angle)
  q = MatMul(x, q_weight)
  q4 = Reshape(q, q_shape)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  k = MatMul(x, k_weight)
  k4 = Reshape(k, k_shape)
  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
  k5 = Unsqueeze(kt, two)
  kr = Expand(k5, times)
  kh = Reshape(kr, grouped)
  KEYS
  kx = Transpose<perm = [0, 1, 3, 2]>(ky)
  v = MatMul(x, v_weight)
  v4 = Reshape(v, k_shape)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  v5 = Unsqueeze(vt, two)
  vr = Expand(v5, times)
  vh = Reshape(vr, grouped)
  VALUES
  scores = MatMul(qt, kx)
  masked = Add(scores, mask)
  weights = Softmax(masked)
  context = MatMul(weights, vy)
  back = Transpose<perm = [0, 2, 1, 3]>(context)
  joined = Reshape(back, flat)
  logits = MatMul(joined, out)
}
"""
TURNED = """
  kc = Mul(kh, cosine)
  ka, kb = Split<axis = 3, num_outputs = 2>(kh)
  kn = Neg(kb)
  ko = Concat<axis = 3>(kn, ka)
  ks = Mul(ko, sine)
  ky = Add(kc, ks)
"""
QUANTISED = "{0}q = QuantizeLinear({0}h, step, middle) {0}y = DequantizeLinear({0}q, step, middle)"
CASES = {
    "plain": ("ky = Identity(kh)", "vy = Identity(vh)"),
    "turned": (TURNED, "vy = Identity(vh)"),
    "quantised": (QUANTISED.format("k"), QUANTISED.format("v")),
}


def subject(name):
    keys, values = CASES[name]
    return Subject.of(read(TEXT.replace("KEYS", keys).replace("VALUES", values)))


def logits(subject):
    proto = io.to_proto(subject.model)
    return in_onnxruntime(proto)(texts(proto))["logits"]


def kv_heads(subject):
    analysis = analyse(subject.model)
    return [counts_of(analysis.flow, head).kv_heads for head in analysis.heads]


@pytest.mark.parametrize("name", CASES)
def test_each_head_stands_once_in_the_weights(name):
    given = subject(name)
    before = logits(given)
    assert kv_heads(given) == [2]

    outcome = ExpandGqa().apply(given)

    assert isinstance(outcome, Changed)
    assert kv_heads(given) == [4]
    assert not any(node.op_type == "Expand" for node in given.model.graph)
    assert difference(logits(given), before) < 1e-5
    MergeKvHeads(kv_heads=2).apply(given)
    assert difference(logits(given), before) < 1e-5
    without = io.to_proto(given.model)
    Inject().apply(given)
    assert_law(without, io.to_proto(given.model))
