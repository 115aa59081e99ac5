"""Fused attention of com.microsoft computes the same when decomposed, and gets a KV cache like standard operators."""

# ruff: noqa: E501  # one case per line

import pytest
from attentions import assert_law_of, in_order
from exports import FILES, export, injected
from laws import assert_law, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.decompose import decompose
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject

TEXT = """case (float[b, n, 8] x, int64[b, n] attention_mask) => (float[b, n, 8] logits)
<float[8, 24] w, float[24] bias, float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, int64 nought = {0}, int64 one = {1},
 int64[1] first = {0}, int64[1] second = {1}, int64[2] heads = {0, 1}, int64[4] apart = {0, 0, 2, -1}, int64[1] fourth = {3}, int32[8] places, float low = {-10000.0}, float zero = {0.0},
 uint8[8, 24] w8, float s1 = {0.03}, float sw = {0.002}, uint8 z1 = {128}, uint8 zw = {1}>
{
  mask = Cast<to = 6>(attention_mask)
  sizes = Shape(x)
  whole = Gather(sizes, second)
  total = Cast<to = 6>(whole)
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
  keys = Unsqueeze(attention_mask, second)
  counted = Greater(keys, nought)
  both = And(allowed, counted)
  each = Cast<to = 6>(both)
  u = QuantizeLinear(x, s1, z1)
  summed = ReduceSum<keepdims = 0>(mask, second)
  batch = Shape(summed)
  floats = Cast<to = 1>(mask)
  first_seen = ArgMax<axis = 1, keepdims = 0>(floats)
  begins = Cast<to = 6>(first_seen)
  ends = Expand(total, batch)
  bounds = Concat<axis = 0>(ends, begins)
  qh = Reshape(q, apart)
  kh = Reshape(k, apart)
  vh = Reshape(v, apart)
  qu = Unsqueeze(qh, fourth)
  ku = Unsqueeze(kh, fourth)
  vu = Unsqueeze(vh, fourth)
  qkv = Concat<axis = 3>(qu, ku, vu)
  kv = Concat<axis = 3>(ku, vu)
  kf = Transpose<perm = [0, 2, 1, 3]>(kh)
  vf = Transpose<perm = [0, 2, 1, 3]>(vh)
  BODY
}"""
CASES = [
    ("causal", "Attention<num_heads = 2, unidirectional = 1>(x, w, bias)"),
    ("causal, padded", "Attention<num_heads = 2, unidirectional = 1>(x, w, bias, mask)"),
    ("causal by a bias", "Attention<num_heads = 2>(x, w, bias, mask, , added)"),
    ("a mask for each query", "Attention<num_heads = 2>(x, w, bias, each)"),
    ("a scale and a filter", "Attention<num_heads = 4, unidirectional = 1, scale = 0.3, mask_filter_value = -30000.0>(x, w, bias, mask)"),
    ("quantized", "QAttention<num_heads = 2, unidirectional = 1>(u, w8, bias, s1, sw, mask, z1, zw)"),
    ("left padding", "Attention<num_heads = 2, unidirectional = 1>(x, w, bias, bounds)"),
    ("sequence lengths", "Attention<num_heads = 2, unidirectional = 1>(x, w, bias, ends)"),
    ("value features declared", "Attention<num_heads = 2, unidirectional = 1, qkv_hidden_sizes = [8, 8, 8]>(x, w, bias, mask)"),
    ("keys with heads", "MultiHeadAttention<num_heads = 2>(q, kf, vf, , , added)"),
    ("keys with heads, bias", "MultiHeadAttention<num_heads = 2>(q, kf, vf, bias, , added)"),
    ("sequence lengths of three inputs", "MultiHeadAttention<num_heads = 2, unidirectional = 1>(q, k, v, , ends)"),
    ("a mask for each query, three inputs", "MultiHeadAttention<num_heads = 2>(q, k, v, , each)"),
    ("three inputs", "MultiHeadAttention<num_heads = 2, unidirectional = 1>(q, k, v)"),
    ("three inputs, bias", "MultiHeadAttention<num_heads = 4, unidirectional = 1>(q, k, v, bias)"),
    ("three inputs, padded", "MultiHeadAttention<num_heads = 2>(q, k, v, bias, mask, added)"),
]  # fmt: skip
PACKED = [  # onnxruntime has no CPU kernel for these; the last column is the same unpacked
    ("packed QKV", "qkv", "q, k, v"),
    ("packed QKV, bias", "qkv, , , bias", "q, k, v, bias"),
    ("packed QKV, padded", "qkv, , , , mask", "q, k, v, , mask"),
    ("packed KV", "q, kv", "q, k, v"),
    ("packed KV, bias", "q, kv, , bias", "q, k, v, bias"),
]


def text(body: str) -> str:
    return TEXT.replace("BODY", f"logits = com.microsoft.{body}")


@pytest.mark.parametrize("body", [pytest.param(body, id=title) for title, body in CASES])
def test_decomposed_attention_computes_the_same(body):
    original = in_order(read(text(body)))
    whole = texts(original)
    decomposed = io.to_proto(decompose(Subject.of(original).model).model)
    found, expected = (in_onnxruntime(one)(whole)["logits"] for one in (decomposed, original))
    assert difference(found, expected, whole["attention_mask"]) < 1e-5


@pytest.mark.parametrize("body", [pytest.param(body, id=title) for title, body in CASES])
def test_attention_with_a_cache_computes_the_same(body):
    assert_law_of(text(body))


@pytest.mark.parametrize(("packed", "separate"), [pytest.param(*case, id=title) for title, *case in PACKED])
def test_packed_inputs_compute_the_same(packed, separate):
    packed, separate = (
        in_order(read(text(f"MultiHeadAttention<num_heads = 2, unidirectional = 1>({inputs})")))
        for inputs in (packed, separate)
    )
    assert_law(separate, injected(packed))


def test_sequence_lengths_do_not_change_unpadded_texts():
    original = in_order(read(text("Attention<num_heads = 2, unidirectional = 1>(x, w, bias, summed)")))
    assert_law(original, injected(original), texts(original, padded=False))


def test_no_fused_operator_is_left():
    model = injected(read(text("Attention<num_heads = 2, unidirectional = 1>(x, w, bias, mask)")))
    assert not any(node.op_type == "Attention" for node in model.graph.node)
    assert [value.name for value in model.graph.output] == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [("Attention<num_heads = 2>(x, w, bias, mask)", "attention is not causal"),
     ("MultiHeadAttention<num_heads = 2>(q, k, v)", "attention is not causal"),
     ("Attention<num_heads = 2, unidirectional = 1, do_rotary = 1>(x, w, bias, mask)", "do_rotary is not supported"),
     ("Attention<num_heads = 2>(x, w, bias, summed)", "attention is not causal"),
     ("Attention<num_heads = 2, unidirectional = 1>(x, w, bias, places)", "unknown mask layout"),
     ("Attention<num_heads = 2, unidirectional = 1>(x, w, bias, mask, v)", "already has a cache"),
     ("MultiHeadAttention<num_heads = 2, unidirectional = 1>(q)", "input 1 is missing")],
    ids=["bidirectional", "bidirectional, three inputs", "rotary", "sequence lengths", "unknown mask", "past", "missing keys"],
)  # fmt: skip
def test_unsupported_attention_is_rejected(body, reason):
    with pytest.raises(UnsupportedError, match=reason):
        injected(in_order(read(text(body))))


@pytest.mark.parametrize("name", FILES)
def test_a_model_without_anything_to_decompose_is_returned_itself(name):
    model = io.load(export(name))
    assert decompose(model).model is model, "passes edit the graph that the analysis refers to"
