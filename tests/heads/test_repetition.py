"""Heads that are repeated before rotation or quantization: they are traced to the value with each head once."""

from __future__ import annotations

import pytest
from grouped import grouped_attention, kv_heads, logits
from laws import assert_law, difference
from written import read

from kvsurgeon import io
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads

ANGLES = "place = Cast<to = 1>(rows) angle = Mul(place, quarter) cosine = Cos(angle) sine = Sin(angle)"
ROTATED = """
  kc = Mul(kh, cosine)
  ka, kb = Split<axis = 3, num_outputs = 2>(kh)
  kn = Neg(kb)
  ko = Concat<axis = 3>(kn, ka)
  ks = Mul(ko, sine)
  ky = Add(kc, ks)
"""
QUANTIZED = "{0}q = QuantizeLinear({0}h, step, middle) {0}y = DequantizeLinear({0}q, step, middle)"
CASES = {
    "plain": {},
    "rotated": {"context": ANGLES, "repeated_keys": ROTATED},
    "quantized": {
        "repeated_keys": QUANTIZED.format("k"),
        "repeated_values": QUANTIZED.format("v"),
        "constants": "float step = {0.05}, int8 middle = {0}",
    },
}


@pytest.mark.parametrize("name", CASES)
def test_expanding_removes_the_repetition(name):
    given = Subject.of(read(grouped_attention(**CASES[name], head_dim=4)))
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
