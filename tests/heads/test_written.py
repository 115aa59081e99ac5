"""Heads of models written as text: what stands between projection and product, case by case."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from laws import difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import Refused, UsageError
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.expand_gqa import ExpandGqa
from kvsurgeon.passes.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.passes.share_kv_layers import ShareKvLayers
from kvsurgeon.sequence.analysis import analyse

# 4 query heads, 2 key heads of 3; the mask is made of lengths
TEXT = """
g (int64[batch_size, sequence_length] input_ids) => (float[batch_size, sequence_length, 9] logits)
 <float[9, 8] table, float[8, 12] q_weight, float[8, 6] k_weight, float[8, 6] v_weight, float[12, 9] out,
  int64[4] q_shape = {{0, 0, 4, 3}}, int64[4] k_shape = {{0, 0, 2, 3}}, int64[3] flat = {{0, 0, 12}},
  int64[1] two = {{2}}, int64[5] times = {{1, 1, 2, 1, 1}}, int64[4] grouped = {{0, 4, -1, 3}},
  float low = {{-10000}}, float none = {{0}}, int64 zero = {{0}}, int64 first = {{1}}, float eps = {{0.00001}},
  int64 one = {{1}}, int64[2] column = {{-1, 1}}, float square = {{2}} {weights}>
{{
  x = Gather(table, input_ids)
  q = MatMul(x, q_weight)
  q4 = Reshape(q, q_shape)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  {keys}
  k4 = Reshape(k, k_shape)
  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
  k5 = Unsqueeze(kt, two)
  kr = Expand(k5, times)
  kh = Reshape(kr, grouped)
  kx = Transpose<perm = [0, 1, 3, 2]>(kh)
  {values}
  v4 = Reshape(v, k_shape)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  v5 = Unsqueeze(vt, two)
  vr = Expand(v5, times)
  vh = Reshape(vr, grouped)
  shape = Shape(input_ids)
  length = Gather(shape, one)
  row = Range(zero, length, first)
  rows = Reshape(row, column)
  seen = LessOrEqual(row, rows)
  mask = Where(seen, none, low)
  scores = MatMul(qt, kx)
  masked = Add(scores, mask)
  weights = Softmax(masked)
  context = MatMul(weights, vh)
  back = Transpose<perm = [0, 2, 1, 3]>(context)
  joined = Reshape(back, flat)
  logits = MatMul(joined, out)
}}
"""
VALUES = "v = MatMul(x, v_weight)"
PLAIN = "k = MatMul(x, k_weight)"
CASES = {
    "plain": (PLAIN, VALUES, ""),
    "a bias": ("k0 = MatMul(x, k_weight) k = Add(k0, bias)", VALUES, ", float[6] bias"),
    "a low rank branch": (
        "k0 = MatMul(x, k_weight) ka = MatMul(x, down) kb = MatMul(ka, up) k = Add(k0, kb)",
        VALUES,
        ", float[8, 2] down, float[2, 6] up",
    ),
    "a norm over all heads": (
        "k0 = MatMul(x, k_weight) k1 = Pow(k0, square) k2 = ReduceMean<keepdims = 1>(k1, last) k3 = Add(k2, eps) "
        "k6 = Sqrt(k3) k7 = Div(k0, k6) k = Mul(k7, norm)",
        VALUES,
        ", float[6] norm, int64[1] last = {-1}",
    ),
    "a layer norm over all heads": (
        "k0 = MatMul(x, k_weight) k = LayerNormalization(k0, norm, bias)",
        VALUES,
        ", float[6] norm, float[6] bias",
    ),
    "weights behind a transpose": (
        "kw = Transpose<perm = [1, 0]>(turned) k = MatMul(x, kw)",
        VALUES,
        ", float[6, 8] turned",
    ),
    "one product for keys and values": (
        "kv = MatMul(x, both) k, v = Split<axis = -1, num_outputs = 2>(kv)",
        "",
        ", float[8, 12] both",
    ),
    "keys and values head by head": (
        "kv = MatMul(x, both) pairs = Reshape(kv, apart) k8 = Gather<axis = 3>(pairs, zero) k = Reshape(k8, six)",
        "v8 = Gather<axis = 3>(pairs, one) v = Reshape(v8, six)",
        ", float[8, 12] both, int64[5] apart = {0, 0, 2, 2, 3}, int64[3] six = {0, 0, 6}",
    ),
    "a scale for each head": (
        "k0 = MatMul(x, k_weight) kk = Reshape(k0, k_shape) ks = Mul(kk, scale) k = Reshape(ks, six)",
        VALUES,
        ", float[2, 1] scale, int64[3] six = {0, 0, 6}",
    ),
    "rows written over others": (
        "k0 = MatMul(x, k_weight) kk = Reshape(k0, k_shape) k1 = Transpose<perm = [3, 0, 1, 2]>(kk) kn = Neg(k1) "
        "k2 = ScatterND(k1, numbers, kn) k3 = Transpose<perm = [1, 2, 3, 0]>(k2) k = Reshape(k3, six)",
        VALUES,
        ", int64[3, 1] numbers = {2, 0, 1}, int64[3] six = {0, 0, 6}",
    ),
    "values that are the keys": (PLAIN, "v = Identity(k)", ""),
}


def subject(case):
    keys, values, weights = CASES[case]
    return Subject.of(read(TEXT.format(keys=keys, values=values, weights=weights)))


def logits(subject):
    proto = io.to_proto(subject.model)
    return in_onnxruntime(proto)(texts(proto))["logits"]


def kv_heads(subject):
    analysis = analyse(subject.model)
    return [counts_of(analysis.flow, head).kv_heads for head in analysis.heads]


@pytest.mark.parametrize("case", CASES)
def test_expanding_changes_nothing(case):
    given = subject(case)
    before = logits(given)
    assert kv_heads(given) == [2]

    assert isinstance(ExpandGqa().apply(given), Changed)

    assert kv_heads(given) == [4]
    assert difference(logits(given), before) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if "head by head" not in case])
def test_merged_weights_are_those_that_numpy_merges(case):
    given, expected = subject(case), subject(case)
    MergeKvHeads(kv_heads=1).apply(given)

    for name in ("k_weight", "v_weight", "both", "bias", "norm", "up", "scale", "turned"):
        value = expected.model.graph.initializers.get(name)
        if value is None:
            continue
        array = value.const_value.numpy()
        axis = 0 if name in ("scale", "turned") else array.ndim - 1
        parts = np.split(array, array.shape[axis] // (1 if name == "scale" else 3), axis=axis)
        means = [np.mean(parts[at : at + 2], axis=0) for at in range(0, len(parts), 2)]
        merged = np.concatenate([mean for mean in means for _ in range(2)], axis=axis)
        value.const_value = ir.Tensor(merged.astype(array.dtype), name=name)
    assert kv_heads(given) == [1]
    assert difference(logits(given), logits(expected)) < 1e-5


def test_counts_that_cannot_be_are_listed():
    with pytest.raises(UsageError, match="expected one of 2, 4 KV heads, found 6"):
        ReplicateKvHeads(repeat=3).apply(subject("plain"))
    with pytest.raises(UsageError, match="expected one of 1, 2 KV heads, found 4"):
        MergeKvHeads(kv_heads=4).apply(subject("plain"))
    with pytest.raises(UsageError, match="1 attention layers: expected 1 to 1, found 2"):
        ShareKvLayers(kv_layers=2).apply(subject("plain"))
    with pytest.raises(UsageError, match="reads itself or an earlier layer"):
        ShareKvLayers(map=(1,)).apply(subject("plain"))
    with pytest.raises(UsageError, match="expected one of --repeat and --kv-heads"):
        ReplicateKvHeads().apply(subject("plain"))


def test_a_sum_over_all_heads_is_refused():
    keys = "k0 = MatMul(x, k_weight) k1 = ReduceSum<keepdims = 1>(k0, last) k = Div(k0, k1)"
    given = Subject.of(read(TEXT.format(keys=keys, values=VALUES, weights=", int64[1] last = {-1}")))

    with pytest.raises(Refused, match="ReduceSum: it works on all heads at once"):
        ExpandGqa().apply(given)
