"""`GroupQueryAttention` computes the same when decomposed, and with a KV cache, for all of its inputs."""

import pytest
from exports import injected
from laws import assert_law, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.decompose import decompose
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject

TEXT = """case (float[b, n, 32] x, int64[b, n] attention_mask, int64[b, n] position_ids) => (float[b, n, 64] logits)
<float[32, 64] wq, float[32, 32] wk, float[32, 32] wv, float[32, 128] wqkv, int64 one = {1}, int64[1] second = {1},
 int64[3] widths = {64, 32, 32}, float[64, 8] cos, float[64, 8] sin,
 float[4] sink, float[1, 4, 64, 64] table, int64[2] noughts = {0, 0}, int64[2] lasts = {2, 3},
 float[16] normq, float[16] normk, int64[4] four = {0, 0, -1, 16}, int64[3] three = {0, 0, -1},
 float[2, 2, 3, 16] k4, float[2, 2, 3, 16] v4, int32[2] three_tokens = {2, 2}>
{
  counted = ReduceSum<keepdims = 0>(attention_mask, second)
  before = Sub(counted, one)
  ends = Cast<to = 6>(before)
  sizes = Shape(attention_mask)
  length = Gather(sizes, one)
  total = Cast<to = 6>(length)
  lengths = Gather(sizes, second)
  both = Concat<axis = 0>(lengths, lengths)
  bias = Slice(table, noughts, both, lasts)
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  q4 = Reshape(q, four)
  qr = SimplifiedLayerNormalization<axis = -1, epsilon = 0.000001>(q4, normq)
  qn = Reshape(qr, three)
  kh = Reshape(k, four)
  kr = SimplifiedLayerNormalization<axis = -1, epsilon = 0.000001>(kh, normk)
  kn = Reshape(kr, three)
  qkv = MatMul(x, wqkv)
  logits = com.microsoft.GroupQueryAttention<ATTRIBUTES>(INPUTS)
}"""
SEPARATE, PACKED = "q, k, v, , , ends, total", "qkv, , , , , ends, total"
WIDE = "num_heads = 2, kv_num_heads = 1"  # heads of twice the width
CASES = [
    ("separate", "", SEPARATE),
    ("packed", "", PACKED),
    ("rotary", "do_rotary = 1", f"{SEPARATE}, cos, sin"),
    ("rotary, packed", "do_rotary = 1", f"{PACKED}, cos, sin"),
    ("rotary, interleaved", "do_rotary = 1, rotary_interleaved = 1", f"{SEPARATE}, cos, sin"),
    ("partial rotary", f"{WIDE}, do_rotary = 1", f"{SEPARATE}, cos, sin"),
    ("partial rotary, interleaved", f"{WIDE}, do_rotary = 1, rotary_interleaved = 1", f"{PACKED}, cos, sin"),
    ("unused rotary tables", "", f"{SEPARATE}, cos, sin"),
    ("position_ids", "do_rotary = 1", f"{SEPARATE}, cos, sin, position_ids"),
    ("sliding window", "local_window_size = 3", PACKED),
    ("softcap", "softcap = 2.0", SEPARATE),
    ("scale", "scale = 0.5", SEPARATE),
    ("bias", "", f"{SEPARATE}, , , , bias"),
    ("bias after softcap", "softcap = 2.0", f"{SEPARATE}, , , , bias"),
    ("sinks", "", f"{SEPARATE}, , , , , sink"),
    ("sinks, sliding window", "local_window_size = 4", f"{PACKED}, , , , , sink"),
    ("smooth softmax", "smooth_softmax = 1", SEPARATE),
]


def model(attributes: str, inputs: str, opset: int = 18):
    heads = "" if attributes.startswith("num_heads") else "num_heads = 4, kv_num_heads = 2, "
    return read(TEXT.replace("ATTRIBUTES", (heads + attributes).removesuffix(", ")).replace("INPUTS", inputs), opset)


def decomposed(original):
    return io.to_proto(decompose(Subject.of(original).model).model)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize(("attributes", "inputs"), [pytest.param(*case, id=title) for title, *case in CASES])
def test_decomposed_attention_computes_the_same(attributes, inputs, opset):
    original = model(attributes, inputs, opset)
    whole = texts(original, length=11, padded=False)
    found, expected = (in_onnxruntime(one)(whole)["logits"] for one in (decomposed(original), original))
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize(("attributes", "inputs"), [pytest.param(*case, id=title) for title, *case in CASES])
def test_attention_with_a_cache_computes_the_same(attributes, inputs):
    original = model(attributes, inputs)
    assert_law(original, injected(original), texts(original, padded=False))


def test_left_padding_is_not_verified():
    """The operator gets sequence lengths and attends to the first tokens, padding or not."""
    original = model("do_rotary = 1", f"{PACKED}, cos, sin")
    report = verify(original, injected(original))
    assert report.verdict == "same"
    reason = "the reference model treats padding differently if other tokens follow"
    assert f"left padding was not compared: {reason}" in report.notes


@pytest.mark.parametrize("seed", [0, 180], ids=["usual holes", "holes beside each other"])
def test_a_model_of_fixed_length_computes_the_same(seed):
    original = model("do_rotary = 1", f"{PACKED}, cos, sin")
    sizes = {"b": 2, "n": 24}
    for value in (*original.graph.input, *original.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = sizes[size.dim_param]
    report = verify(original, injected(original), seed=seed)
    assert report.verdict == "same"
    for scenario in ("left padding", "holes in the mask"):
        assert any(f"{scenario} was not compared" in note for note in report.notes)


def test_the_assumption_about_padding_is_noted():
    subject = Subject.of(model("", SEPARATE))
    outcome = Inject().apply(subject)
    assert isinstance(outcome, Changed)
    assert "right padding is assumed" in outcome.notes[0]


@pytest.mark.parametrize(
    ("attributes", "inputs", "reason"),
    [
        ("causal = 0", SEPARATE, "attention is not causal"),
        ('k_quant_type = "PER_TENSOR"', SEPARATE, "quantized KV cache"),
        ("", "q, k, v, k4, v4, ends, total", "already has a cache"),
        ("", "q, k, v, , , three_tokens, total", "expected 1 keys, as many as tokens, found 3 of 1 keys"),
    ],
    ids=["bidirectional", "quantized", "past", "other lengths"],
)
def test_unsupported_attention_is_rejected(attributes, inputs, reason):
    with pytest.raises(UnsupportedError, match=reason):
        injected(model(attributes, inputs))


def test_heads_are_normalized_before_rotary_embedding():
    """No CPU kernel does this, so the expected model normalizes heads before the operator."""
    normed = model("do_rotary = 1", f"{SEPARATE}, cos, sin, , , , , , normq, normk")
    by_hand = model("do_rotary = 1", f"{SEPARATE.replace('q, k', 'qn, kn')}, cos, sin")
    assert_law(by_hand, injected(normed), texts(by_hand, padded=False))
