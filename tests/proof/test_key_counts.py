"""The numbers of keys that fused attention is given are those of the tokens."""

from __future__ import annotations

import pytest
from exports import injected
from laws import assert_law, in_chunks, in_onnxruntime, texts
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from written import read

from kvsurgeon.errors import Code, UnsupportedError

GROUPED = "GroupQueryAttention<num_heads = 2, kv_num_heads = 2>(q, q, q, , , ends, total)"
MULTI_HEAD = "MultiHeadAttention<num_heads = 2, unidirectional = 1>(q, q, q, , counts)"


def counting(counts: str, attention: str = GROUPED):
    """Return a decoder that computes `counts [b]` of keys from its inputs."""
    return read(f"""case (int64[b, n] ids, int64[b, n] attention_mask, int64[b, n] position_ids)
 => (float[b, n, 16] logits)
<float[7, 16] table, float[200, 16] places, float[16, 16] wq, int64 one = {{1}}, int64 three = {{3}},
 int64[1] second = {{1}}, int64[1] end = {{-1}}, int64[1] far = {{1000000}}, int64 hundred = {{100}}>
{{
  words = Gather(table, ids)
  rows = Gather(places, position_ids)
  x = Add(words, rows)
  q = MatMul(x, wq)
  sizes = Shape(ids)
  length = Gather(sizes, one)
  total = Cast<to = 6>(length)
  summed = ReduceSum<keepdims = 0>(attention_mask, second)
  {counts}
  before = Sub(found, one)
  ends = Cast<to = 6>(before)
  counts = Cast<to = 6>(found)
  logits = com.microsoft.{attention}
}}""")


@pytest.mark.parametrize("attention", [GROUPED, MULTI_HEAD], ids=["grouped", "multi-head"])
@pytest.mark.parametrize(
    "counts",
    ["found = Sub(summed, three)",
     "full = Equal(summed, length)\n fewer = Sub(summed, three)\n found = Where(full, summed, fewer)",
     "known = Greater(ids, one)\n as_ints = Cast<to = 7>(known)\n found = ReduceSum<keepdims = 0>(as_ints, second)"],
    ids=["fewer", "fewer if padded", "of content"],
)  # fmt: skip
def test_fewer_keys_than_tokens_are_rejected(counts, attention):
    with pytest.raises(UnsupportedError, match="the number of keys that attention reads") as caught:
        injected(counting(counts, attention))
    assert caught.value.code is Code.FUSED_OPERATOR


@pytest.mark.parametrize(
    "counts",
    ["found = Identity(summed)",
     "last = Slice(position_ids, end, far, second)\n largest = Squeeze(last, second)\n found = Add(largest, one)"],
    ids=["mask", "positions"],
)  # fmt: skip
def test_as_many_keys_as_tokens_are_right(counts):
    original = counting(counts)
    assert_law(original, injected(original), texts(original, padded=False))


def test_a_number_of_keys_with_a_bound_limits_the_length():
    original = counting("found = Min(summed, hundred)")
    model = injected(original)
    assert_law(original, model, texts(original, padded=False, length=100), cuts=(98, 99))
    whole = texts(original, padded=False, length=101)
    with pytest.raises(InvalidArgument, match="exceeds_the_maximum_of_100_tokens"):
        in_chunks(model, in_onnxruntime(model), whole, cuts=(99, 100))
