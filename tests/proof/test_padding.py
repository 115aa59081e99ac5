"""Padding that attends to later tokens must not affect unmasked tokens, in short texts and in long ones."""

import onnx
import pytest
from attentions import in_order
from exports import injected
from laws import assert_law, texts
from written import read

from kvsurgeon.errors import UnsupportedError

TEXT = """
two_layers (float[batch, length, 8] x, int64[batch, length] attention_mask) => (float[batch, length, 8] logits)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[8, 8] wq2, float[8, 8] wk2, float[8, 8] wv2, int64 zero = {0},
 int64 one = {1}, int64[1] first = {0}, int64[1] second = {1}, int64[1] two = {2}, int64[1] last = {-1},
 float masked = {-10000.0}>
{
  sizes = Shape(x)
  n1 = Slice(sizes, second, two)
  n = Squeeze(n1)
  at = Range(zero, n, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  causal = LessOrEqual(row, column)
  key_mask = Unsqueeze(attention_mask, second)
  unpadded = Cast<to = 9>(key_mask)
  visible = And(causal, unpadded)
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  v = MatMul(x, wv)
  kt = Transpose<perm = [0, 2, 1]>(k)
  s = MatMul(q, kt)
  s_visible = Where(visible, s, masked)
  w = Softmax<axis = -1>(s_visible)
  c = MatMul(w, v)
  h = Add(x, c)
  q2 = MatMul(h, wq2)
  k2 = MatMul(h, wk2)
  v2 = MatMul(h, wv2)
  kt2 = Transpose<perm = [0, 2, 1]>(k2)
  s2 = MatMul(q2, kt2)
  s2_visible = Where(visible, s2, masked)
  w2 = Softmax<axis = -1>(s2_visible)
  c2 = MatMul(w2, v2)
  GATE
}
"""
NONE = "logits = Add(h, c2)"
LARGEST = """
  s2_causal = Where(causal, s2, masked)
  largest = ReduceMax<keepdims = 1>(s2_causal, last)
  gate = Sigmoid(largest)
  logits = Mul(c2, gate)
"""


def test_padding_that_only_padding_attends_to_is_accepted():
    original = read(TEXT.replace("GATE", NONE))
    assert_law(original, injected(original))


FROM_THE_END = """count = ReduceSum<keepdims = 1>(attention_mask, second)
  padding = Sub(n, count)
  from_padding = Sub(row, padding)
  position = Max(from_padding, zero)
  numbers = Cast<to = 1>(position)
  factors = Unsqueeze(numbers, two)
  x0 = Mul(x, factors)
  q = MatMul(x0, wq)"""


def test_positions_that_count_all_masked_tokens_are_rejected():
    counted = TEXT.replace("GATE", NONE).replace("q = MatMul(x, wq)", FROM_THE_END)
    with pytest.raises(UnsupportedError, match="context change if a later token is masked"):
        injected(read(counted.replace("k = MatMul(x,", "k = MatMul(x0,")))


def test_padding_that_a_gate_reads_is_rejected():
    with pytest.raises(UnsupportedError, match="masked tokens attend to later tokens") as refused:
        injected(read(TEXT.replace("GATE", LARGEST)))
    assert refused.value.layer == 1


def test_padding_that_ends_inside_a_pair_of_tokens_is_rejected():
    """The second token of a pair reads the first one, which may be the last masked token."""
    pairs = """
  even = Slice(c2, first, end, second, two)
  end = Constant<value_ints = [1099511627776]>()
  apart = Unsqueeze(even, two)
  both = Concat<axis = 2>(apart, apart)
  flat_sizes = Constant<value_ints = [0, -1, 8]>()
  flat = Reshape(both, flat_sizes)
  pairs = Slice(flat, first, n1, second)
  logits = Add(c2, pairs)"""
    with pytest.raises(UnsupportedError, match="masked tokens attend to later tokens"):
        injected(in_order(read(TEXT.replace("GATE", pairs))))


def with_mask(first: str, second: str) -> str:
    """Return two layers of which each has one of these masks."""
    layers = TEXT.replace("Where(visible, s, ", f"Where({first}, s, ").replace(
        "Where(visible, s2,", f"Where({second}, s2,"
    )
    return layers.replace("GATE", NONE)


def test_padding_that_a_layer_without_a_mask_attends_to_is_rejected():
    with pytest.raises(UnsupportedError, match="masked tokens attend to later tokens") as refused:
        injected(read(with_mask("visible", "causal")))
    assert refused.value.layer == 1


def test_a_state_below_a_layer_that_leaks_may_read_padding():
    """Masked tokens there have not attended to later tokens yet."""
    shifted = "int64[6] shift = {0, 1, 0, 0, -1, 0}, float masked"
    model = TEXT.replace("float masked", shifted).replace("q = MatMul(x", "e = Pad(x, shift)\n  q = MatMul(e")
    original = read(model.replace("GATE", NONE))
    assert_law(original, injected(original))


def test_padding_that_leaks_in_the_last_layer_is_accepted():
    original = read(with_mask("causal", "visible"))
    assert_law(original, injected(original))


def test_padding_that_is_nan_in_a_call_of_padding_alone_is_rejected():
    """The last row of the mask is added to all: twice the least number is minus infinity, at every key of padding."""
    added_to = """bias = Where(visible, no, masked)
  bias_last = Slice(bias, last, end, first_axis)
  both = Add(bias, bias_last)
  s_visible = Add(s, both)"""
    numbers = "float no = {0.0}, int64[1] end = {9223372036854775807}, int64[1] first_axis = {1}, float masked"
    model = TEXT.replace("s_visible = Where(visible, s, masked)", added_to).replace("float masked", numbers)
    largest = model.replace("-10000.0", "-3.4e38").replace("GATE", NONE)
    with pytest.raises(UnsupportedError, match="NaN unless later tokens follow") as refused:
        injected(read(largest))
    assert refused.value.layer == 0
    original = read(largest.replace("-3.4e38", "-1e38"))
    assert_law(original, injected(original))


NUMBERS = "int64 limit = {300}, float masked"
BEYOND = {  # what masks see of padding if something is beyond 300
    "the text": "beyond = Greater(n, limit)",
    "the number of tokens": "count = ReduceSum(attention_mask, second)\n  count3 = Unsqueeze(count, second)\n"
    "  beyond = Greater(count3, limit)",
    "the number of masked tokens": "count = ReduceSum(attention_mask, second)\n  pads = Sub(n1, count)\n"
    "  pads3 = Unsqueeze(pads, second)\n  beyond = Greater(pads3, limit)",
}


def with_numbers(beyond: str, seen: str) -> onnx.ModelProto:
    """Return two layers whose mask is `seen`, which may read `beyond`."""
    layers = TEXT.replace("visible = And(causal, unpadded)", f"{beyond}\n  {seen}")
    return read(layers.replace("float masked", NUMBERS).replace("GATE", NONE))


@pytest.mark.parametrize("beyond", BEYOND.values(), ids=BEYOND.keys())
def test_padding_that_is_visible_in_long_texts_is_rejected(beyond):
    original = with_numbers(beyond, "shown = Or(unpadded, beyond)\n  visible = And(causal, shown)")
    with pytest.raises(UnsupportedError, match="masked tokens"):
        injected(original)


def test_padding_that_attends_to_later_padding_beyond_a_position_is_rejected():
    """Tokens attend to padding there too; before that position, nothing does."""
    beyond = "beyond = Greater(row, limit)\n  padded = Not(unpadded)\n  open = And(padded, beyond)"
    original = with_numbers(beyond, "hidden = And(causal, unpadded)\n  visible = Or(hidden, open)")
    with pytest.raises(UnsupportedError, match=r"not causal|masked tokens"):
        injected(original)


def test_a_window_beyond_the_computed_lengths_is_accepted():
    original = with_numbers("near = Sub(row, column)\n  within = Less(near, limit)", "both = And(causal, within)\n"
                     "  visible = And(both, unpadded)")  # fmt: skip
    assert_law(original, injected(original), texts(original, length=320), cuts=(300, 301, 302))
