"""`GroupQueryAttention` of com.microsoft, in each of its forms: what it computes, with a cache as without."""

# a case is read best on one line

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
APART, PACKED = "q, k, v, , , ends, total", "qkv, , , , , ends, total"
WIDE = "num_heads = 2, kv_num_heads = 1"  # heads of twice the width
CASES = [
    ("apart", "", APART),
    ("packed", "", PACKED),
    ("turned", "do_rotary = 1", f"{APART}, cos, sin"),
    ("turned and packed", "do_rotary = 1", f"{PACKED}, cos, sin"),
    ("turned in pairs", "do_rotary = 1, rotary_interleaved = 1", f"{APART}, cos, sin"),
    ("turned in part", f"{WIDE}, do_rotary = 1", f"{APART}, cos, sin"),
    ("turned in part, in pairs", f"{WIDE}, do_rotary = 1, rotary_interleaved = 1", f"{PACKED}, cos, sin"),
    ("tables that nothing turns by", "", f"{APART}, cos, sin"),
    ("positions that are given", "do_rotary = 1", f"{APART}, cos, sin, position_ids"),
    ("a window", "local_window_size = 3", PACKED),
    ("a cap", "softcap = 2.0", APART),
    ("a scale", "scale = 0.5", APART),
    ("a bias", "", f"{APART}, , , , bias"),
    ("a bias behind a cap", "softcap = 2.0", f"{APART}, , , , bias"),
    ("sinks", "", f"{APART}, , , , , sink"),
    ("sinks and a window", "local_window_size = 4", f"{PACKED}, , , , , sink"),
    ("a smooth softmax", "smooth_softmax = 1", APART),
]


def model(attributes: str, inputs: str, opset: int = 18):
    heads = "" if attributes.startswith("num_heads") else "num_heads = 4, kv_num_heads = 2, "
    return read(TEXT.replace("ATTRIBUTES", (heads + attributes).removesuffix(", ")).replace("INPUTS", inputs), opset)


def written_out(original):
    return io.to_proto(decompose(Subject.of(original).model).model)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize(("attributes", "inputs"), [pytest.param(*case, id=title) for title, *case in CASES])
def test_written_out_it_is_the_same(attributes, inputs, opset):
    original = model(attributes, inputs, opset)
    whole = texts(original, length=11, padded=False)
    found, expected = (in_onnxruntime(one)(whole)["logits"] for one in (written_out(original), original))
    assert difference(found, expected) < 1e-5


@pytest.mark.parametrize(("attributes", "inputs"), [pytest.param(*case, id=title) for title, *case in CASES])
def test_with_a_cache_it_is_the_same(attributes, inputs):
    original = model(attributes, inputs)
    assert_law(original, injected(original), texts(original, padded=False))


def test_padding_in_front_is_left_to_nobody():
    """The operator is told how many tokens there are, and takes the first ones for them, be they padding."""
    original = model("do_rotary = 1", f"{PACKED}, cos, sin")
    report = verify(original, injected(original))
    assert report.verdict == "same"
    assert "left padding was not judged: the original reads padding before a text otherwise" in report.notes[1]


def test_at_a_fixed_length_it_is_the_same():
    original = model("do_rotary = 1", f"{PACKED}, cos, sin")
    sizes = {"b": 2, "n": 24}
    for value in (*original.graph.input, *original.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = sizes[size.dim_param]
    report = verify(original, injected(original))
    assert report.verdict == "same"
    assert any("left padding was not judged" in note for note in report.notes)


def test_what_is_assumed_of_padding_is_said():
    subject = Subject.of(model("", APART))
    outcome = Inject().apply(subject)
    assert isinstance(outcome, Changed)
    assert "as if padding stood behind them" in outcome.notes[0]


@pytest.mark.parametrize(
    ("attributes", "inputs", "reason"),
    [
        ("causal = 0", APART, "sees the future"),
        ('k_quant_type = "PER_TENSOR"', APART, "in fewer bits"),
        ("", "q, k, v, k4, v4, ends, total", "already has a cache"),
        ("", "q, k, v, , , three_tokens, total", "said to end elsewhere"),
    ],
    ids=["bidirectional", "bits", "past", "other ends"],
)
def test_what_cannot_have_a_cache_is_refused(attributes, inputs, reason):
    with pytest.raises(UnsupportedError, match=reason):
        injected(model(attributes, inputs))


def test_heads_are_normed_before_they_are_turned():
    """No kernel on a CPU does that, so the same is written by hand: norms of heads, then the operator without them."""
    normed = model("do_rotary = 1", f"{APART}, cos, sin, , , , , , normq, normk")
    by_hand = model("do_rotary = 1", f"{APART.replace('q, k', 'qn, kn')}, cos, sin")
    assert_law(by_hand, injected(normed), texts(by_hand, padded=False))
