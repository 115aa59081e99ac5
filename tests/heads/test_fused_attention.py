"""KV head passes on models with fused attention operators, with a cache in the operator and without."""

from __future__ import annotations

import onnx
import pytest
from written import read

from kvsurgeon import io
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.workflow.verification import verify_models

# 4 query heads, 2 KV heads of 16; the operator applies rotary embedding
TEXT = """
case (float[batch_size, sequence_length, 32] x, int64[batch_size, total_sequence_length] attention_mask,
      float[batch_size, 2, past_sequence_length, head_dim] past_key_values.0.key,
      float[batch_size, 2, past_sequence_length, head_dim] past_key_values.0.value)
  => (float[batch_size, sequence_length, 64] logits,
      float[batch_size, 2, total_sequence_length, head_dim] present.0.key,
      float[batch_size, 2, total_sequence_length, head_dim] present.0.value)
<float[32, 64] wq, float[32, 32] wk, float[32, 32] wv, float[32, 128] wqkv, int64 one = {1}, int64[1] second = {1},
 float[64, 8] cos, float[64, 8] sin>
{
  counted = ReduceSum<keepdims = 0>(attention_mask, second)
  before = Sub(counted, one)
  ends = Cast<to = 6>(before)
  sizes = Shape(attention_mask)
  length = Gather(sizes, one)
  total = Cast<to = 6>(length)
  MADE
  logits, "present.0.key", "present.0.value" = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2,
    do_rotary = 1>(GIVEN, "past_key_values.0.key", "past_key_values.0.value", ends, total, cos, sin)
}"""
CASES = {
    "apart": ("q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)", "q, k, v"),
    "packed": ("qkv = MatMul(x, wqkv)", "qkv, , "),
}


def subject(name):
    made, given = CASES[name]
    text = TEXT.replace("MADE", made).replace("GIVEN", given)
    return Subject.of(
        read(text.replace('"', "").replace("past_key_values.0.", "past_").replace("present.0.", "present_"))
    )


def heads(model: onnx.ModelProto):
    shapes = [[size.dim_value for size in one.type.tensor_type.shape.dim] for one in model.graph.input[2:]]
    return [(one.name, shape[1]) for one, shape in zip(model.graph.input[2:], shapes, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_an_operator_that_shares_heads_gets_new_kv_heads(name):
    given = subject(name)
    original = io.to_proto(given.model)

    outcome = ExpandGqa().apply(given)

    expanded = io.to_proto(given.model)
    assert isinstance(outcome, Changed)
    assert outcome.exact
    assert heads(expanded) == [("past_key", 4), ("past_value", 4)]
    assert verify_models(original, expanded).verdict == "same"
    MergeKvHeads(kv_heads=2).apply(given)
    merged = io.to_proto(given.model)
    assert heads(merged) == [("past_key", 2), ("past_value", 2)]
    assert verify_models(original, merged).verdict == "same"
    MergeKvHeads(kv_heads=1).apply(given)
    assert verify_models(original, io.to_proto(given.model)).verdict == "different"


@pytest.mark.parametrize("name", CASES)
def test_fuse_attention_restores_the_operator(name):
    given = subject(name)
    original = io.to_proto(given.model)
    ExpandGqa().apply(given)
    assert "GroupQueryAttention" not in {node.op_type for node in given.model.graph}

    outcome = FuseAttention().apply(given)

    fused = [node for node in given.model.graph if node.op_type == "GroupQueryAttention"]
    assert isinstance(outcome, Changed)
    assert [node.attributes["kv_num_heads"].as_int() for node in fused] == [4]
    assert verify_models(original, io.to_proto(given.model)).verdict == "same"
