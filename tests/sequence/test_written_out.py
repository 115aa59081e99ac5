"""Fused attention of com.microsoft does what standard operators do, and is injected as they are."""

# ruff: noqa: E501  # a case is read best on one line

import pytest
from attentions import assert_law_of
from exports import injected
from written import read

from kvsurgeon.errors import Refused

TEXT = """case (float[b, n, 8] x, int64[b, n] attention_mask) => (float[b, n, 8] logits)
<float[8, 24] w, float[24] bias, float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, int64 nought = {0}, int64 one = {1},
 int64[1] first = {0}, int64[1] second = {1}, int64[2] heads = {0, 1}, float low = {-10000.0}, float zero = {0.0},
 uint8[8, 24] w8, float s1 = {0.03}, float sw = {0.002}, uint8 z1 = {128}, uint8 zw = {1}>
{
  mask = Cast<to = 6>(attention_mask)
  sizes = Shape(x)
  length = Gather(sizes, one)
  at = Range(nought, length, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  allowed = LessOrEqual(row, column)
  square = Where(allowed, zero, low)
  added = Unsqueeze(square, heads)
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  seen = Unsqueeze(attention_mask, second)
  counted = Greater(seen, nought)
  both = And(allowed, counted)
  each = Cast<to = 6>(both)
  u = QuantizeLinear(x, s1, z1)
  BODY
}"""
CASES = [
    ("causal by itself", "Attention<num_heads = 2, unidirectional = 1>(x, w, bias)"),
    ("causal, padded", "Attention<num_heads = 2, unidirectional = 1>(x, w, bias, mask)"),
    ("causal by a bias", "Attention<num_heads = 2>(x, w, bias, mask, , added)"),
    ("a mask for each query", "Attention<num_heads = 2>(x, w, bias, each)"),
    ("a scale and a filter", "Attention<num_heads = 4, unidirectional = 1, scale = 0.3, mask_filter_value = -30000.0>(x, w, bias, mask)"),
    ("quantised", "QAttention<num_heads = 2, unidirectional = 1>(u, w8, bias, s1, sw, mask, z1, zw)"),
    ("three inputs", "MultiHeadAttention<num_heads = 2, unidirectional = 1>(q, k, v)"),
    ("three inputs and their bias", "MultiHeadAttention<num_heads = 4, unidirectional = 1>(q, k, v, bias)"),
    ("three inputs, padded", "MultiHeadAttention<num_heads = 2>(q, k, v, bias, mask, added)"),
]  # fmt: skip


def text(body: str) -> str:
    return TEXT.replace("BODY", f"logits = com.microsoft.{body}")


@pytest.mark.parametrize("body", [pytest.param(body, id=title) for title, body in CASES])
def test_fused_attention(body):
    assert_law_of(text(body))


def test_fused_attention_leaves_no_fused_operator():
    model = injected(read(text("Attention<num_heads = 2, unidirectional = 1>(x, w, bias, mask)")))
    assert not any(node.op_type == "Attention" for node in model.graph.node)
    assert [value.name for value in model.graph.output] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [("Attention<num_heads = 2>(x, w, bias, mask)", "sees the future"),
     ("MultiHeadAttention<num_heads = 2>(q, k, v)", "sees the future"),
     ("Attention<num_heads = 2, unidirectional = 1, do_rotary = 1>(x, w, bias, mask)", "turns queries and keys"),
     ("Attention<num_heads = 2, unidirectional = 1>(x, w, bias, ends)\n ends = ReduceSum<keepdims = 0>(mask, second)", "begin or end"),
     ("Attention<num_heads = 2, unidirectional = 1>(x, w, bias, mask, v)", "already has a cache"),
     ("MultiHeadAttention<num_heads = 2, unidirectional = 1>(q)", "packed"),
     ("GroupQueryAttention<num_heads = 2, kv_num_heads = 2>(q, k, v, , , mask, mask)", "GroupQueryAttention")],
    ids=["bidirectional", "bidirectional of three", "rotary", "an index of ends", "a past", "packed", "grouped"],
)  # fmt: skip
def test_what_is_not_known_is_refused(body, reason):
    lines = text(body)
    if "\n ends" in lines:
        lines = lines.replace("\n ends = ReduceSum<keepdims = 0>(mask, second)", "").replace(
            "sizes = Shape(x)", "sizes = Shape(x)\n  ends = ReduceSum<keepdims = 0>(mask, second)")  # fmt: skip
    with pytest.raises(Refused, match=reason):
        injected(read(lines))
