"""What a padded token sees of those after it must reach nobody else."""

import pytest
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import UnsupportedError

TEXT = """
two_layers (float[batch, length, 8] x, int64[batch, length] attention_mask) => (float[batch, length, 8] logits)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wq2, float[8, 8] wk2, float[8, 8] wv2, int64 nought = {0},
 int64 one = {1}, int64[1] first = {0}, int64[1] second = {1}, int64[1] two = {2}, int64[1] last = {-1},
 float masked = {-10000.0}>
{
  sizes = Shape(x)
  n1 = Slice(sizes, second, two)
  n = Squeeze(n1)
  at = Range(nought, n, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  causal = LessOrEqual(row, column)
  key_mask = Unsqueeze(attention_mask, second)
  unpadded = Cast<to = 9>(key_mask)
  seen = And(causal, unpadded)
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  kt = Transpose<perm = [0, 2, 1]>(k)
  s = MatMul(q, kt)
  s_seen = Where(seen, s, masked)
  w = Softmax<axis = -1>(s_seen)
  c = MatMul(w, v)
  h = Add(x, c)
  q2 = MatMul(h, wq2)
  k2 = MatMul(h, wk2)
  v2 = MatMul(h, wv2)
  kt2 = Transpose<perm = [0, 2, 1]>(k2)
  s2 = MatMul(q2, kt2)
  s2_seen = Where(seen, s2, masked)
  w2 = Softmax<axis = -1>(s2_seen)
  c2 = MatMul(w2, v2)
  GATE
}
"""
NONE = "logits = Add(h, c2)"
LOUDEST = """
  s2_beside = Where(causal, s2, masked)
  loudest = ReduceMax<keepdims = 1>(s2_beside, last)
  gate = Sigmoid(loudest)
  logits = Mul(c2, gate)
"""


def test_padding_that_only_padding_sees_is_no_harm():
    original = read(TEXT.replace("GATE", NONE))
    assert_law(original, injected(original))


def test_padding_that_a_gate_sees_is_refused():
    with pytest.raises(UnsupportedError, match="masked tokens attend to later tokens") as refused:
        injected(read(TEXT.replace("GATE", LOUDEST)))
    assert refused.value.layer == 1
