"""KV head passes on models written as text, with various nodes between projection and product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from grouped import grouped_attention, kv_heads, logits
from laws import difference
from written import read

from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.passes.heads.share_kv_layers import ShareKvLayers

CASES = {
    "plain": {},
    "a bias": {"keys": "k0 = MatMul(x, k_weight) k = Add(k0, bias)", "constants": "float[6] bias"},
    "a low rank branch": {
        "keys": "k0 = MatMul(x, k_weight) ka = MatMul(x, down) kb = MatMul(ka, up) k = Add(k0, kb)",
        "constants": "float[8, 2] down, float[2, 6] up",
    },
    "a norm over all heads": {
        "keys": "k0 = MatMul(x, k_weight) k1 = Mul(k0, k0) k2 = ReduceMean<keepdims = 1>(k1, last) k3 = Sqrt(k2) "
        "k6 = Div(k0, k3) k = Mul(k6, norm)",
        "constants": "float[6] norm",
    },
    "a layer norm over all heads": {
        "keys": "k0 = MatMul(x, k_weight) k = LayerNormalization(k0, norm, bias)",
        "constants": "float[6] norm, float[6] bias",
    },
    "transposed weights": {
        "keys": "kw = Transpose<perm = [1, 0]>(flipped) k = MatMul(x, kw)",
        "constants": "float[6, 8] flipped",
    },
    "one product for keys and values": {
        "keys": "kv = MatMul(x, both) k, v = Split<axis = -1, num_outputs = 2>(kv)",
        "values": "",
        "constants": "float[8, 12] both",
    },
    "keys and values head by head": {
        "keys": "kv = MatMul(x, both) pairs = Reshape(kv, apart) k1 = Gather<axis = 3>(pairs, zero) "
        "k = Reshape(k1, k_flat)",
        "values": "v1 = Gather<axis = 3>(pairs, one) v = Reshape(v1, k_flat)",
        "constants": "float[8, 12] both, int64[5] apart = {0, 0, 2, 2, 3}",
    },
    "a scale for each head": {
        "keys": "k0 = MatMul(x, k_weight) kk = Reshape(k0, k_shape) ks = Mul(kk, scale) k = Reshape(ks, k_flat)",
        "constants": "float[2, 1] scale",
    },
    "scattered rows": {
        "keys": "k0 = MatMul(x, k_weight) kk = Reshape(k0, k_shape) k1 = Transpose<perm = [3, 0, 1, 2]>(kk) "
        "kn = Neg(k1) k2 = ScatterND(k1, numbers, kn) k3 = Transpose<perm = [1, 2, 3, 0]>(k2) k = Reshape(k3, k_flat)",
        "constants": "int64[3, 1] numbers = {2, 0, 1}",
    },
    "values that are the keys": {"values": "v = Identity(k)"},
}


def subject(case):
    return Subject.of(read(grouped_attention(**CASES[case])))


@pytest.mark.parametrize("case", CASES)
def test_expanding_keeps_the_logits(case):
    given = subject(case)
    before = logits(given)
    assert kv_heads(given) == [2]

    assert isinstance(ExpandGqa().apply(given), Changed)

    assert kv_heads(given) == [4]
    assert difference(logits(given), before) < 1e-5


@pytest.mark.parametrize("case", [case for case in CASES if "head by head" not in case])
def test_merged_weights_equal_those_of_numpy(case):
    given, expected = subject(case), subject(case)
    MergeKvHeads(kv_heads=1).apply(given)

    for name in ("k_weight", "v_weight", "both", "bias", "norm", "up", "scale", "flipped"):
        value = expected.model.graph.initializers.get(name)
        if value is None:
            continue
        array = value.const_value.numpy()
        axis = 0 if name in ("scale", "flipped") else array.ndim - 1
        parts = np.split(array, array.shape[axis] // (1 if name == "scale" else 3), axis=axis)
        means = [np.mean(parts[at : at + 2], axis=0) for at in range(0, len(parts), 2)]
        merged = np.concatenate([mean for mean in means for _ in range(2)], axis=axis)
        value.const_value = ir.Tensor(merged.astype(array.dtype), name=name)
    assert kv_heads(given) == [1]
    assert difference(logits(given), logits(expected)) < 1e-5


def test_messages_list_the_valid_counts():
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
    given = Subject.of(read(grouped_attention(keys=keys)))

    with pytest.raises(UnsupportedError, match="ReduceSum mixes all heads"):
        ExpandGqa().apply(given)
