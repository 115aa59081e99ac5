"""Inputs and masks that are seldom written: places that are compared, masks multiplied with themselves, codebooks."""

import onnx
import pytest
from attentions import assert_law_of, attention
from exports import injected
from laws import assert_law
from onnx import helper
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.workflow.verification import verify_models

PLACES = "pq = Unsqueeze(position_ids, third)\n allowed = LessOrEqual(row, pq)"
TWO_LAYERS = """
 q2 = MatMul(c, wq)
 k2 = MatMul(c, wk)
 k2t = Transpose<perm = [0, 2, 1]>(k2)
 s2 = MatMul(q2, k2t)
 bias = Where(allowed, nil, low)
 s2m = Add(s2, bias)
 w2 = Softmax<axis = -1>(s2m)
 logits = MatMul(w2, c)"""
MASK = "int64[b, n] attention_mask"
FLOATS = "am = Cast<to = 1>(attention_mask)\n am_k = Unsqueeze(am, second)\n am_q = Unsqueeze(am, third)\n"
BY_PRODUCT = f"{FLOATS} both = MatMul(am_q, am_k)\n both_seen = Greater(both, half)\n"
BY_MULTIPLYING = f"{FLOATS} both = Mul(am_q, am_k)\n both_seen = Greater(both, half)\n"
BOTH = "causal = LessOrEqual(row, column)\n allowed = And(causal, both_seen)"
FROM_THE_FIRST = """start = ArgMax<axis = 1, keepdims = 1>(attention_mask)
 start_of = Unsqueeze(start, third)
 causal = LessOrEqual(row, column)
 begun = GreaterOrEqual(row, start_of)
 allowed = And(causal, begun)"""


def test_positions_that_mask_keys_count_up():
    text = attention(
        inputs="int64[b, n] position_ids", allowed=PLACES, constants="float nil = {0.0}",
        masked="bias0 = Where(allowed, nil, low)\n masked_scores = Add(s, bias0)", after=TWO_LAYERS,
    )  # fmt: skip
    assert_law_of(text)
    noted = Inject().apply(Subject.of(read(text))).notes
    assert any("position inputs count up" in note for note in noted)


@pytest.mark.parametrize("mask", [f"{BY_PRODUCT} {BOTH}", f"{BY_MULTIPLYING} {BOTH}", FROM_THE_FIRST])
def test_masked_queries_may_see_anything_that_nobody_sees_through_them(mask):
    assert_law_of(attention(inputs=MASK, allowed=mask))


def test_masked_queries_that_attend_ahead_and_are_read_are_rejected():
    text = attention(
        inputs=MASK, allowed=f"{FLOATS} causal = LessOrEqual(row, column)\n q_seen = Greater(am_q, half)",
        masked="s1 = Where(causal, s, low)\n masked_scores = Where(q_seen, s1, low)",
        after="k2 = MatMul(c, wk)\n kt2 = Transpose<perm = [0, 2, 1]>(k2)\n s2 = MatMul(c, kt2)\n"
        "s3 = Where(causal, s2, low)\n w2 = Softmax<axis = -1>(s3)\n logits = MatMul(w2, c)",
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="masked tokens attend to later tokens"):
        injected(read(text))


def test_keys_from_the_last_to_the_first():
    back = """f = Where(allowed, s0, zero)
 r = Slice(f, minus, far, third, minus)
 t = CumSum(r, two)
 u = Slice(t, minus, far, third, minus)
 v_ = Mul(u, half)
 s = Add(s0, v_)"""
    constants = "float zero = {0.0}, int64[1] minus = {-1}, int64[1] far = {-9223372036854775807}, int64 two = {2}"
    assert_law_of(attention(scores=back, constants=constants))


def test_tokens_from_the_last_to_the_first_are_refused():
    constants = "int64[1] minus = {-1}, int64[1] far = {-9223372036854775807}"
    text = attention(hidden="h = Slice(x, minus, far, second, minus)", constants=constants)
    with pytest.raises(UnsupportedError, match="selects tokens by their position"):
        injected(read(text))


def test_tokens_at_addresses_in_a_flattened_batch_are_refused():
    rows = "batch = Gather(sizes, nought)\n rows = Range(nought, batch, one)\n starts = Mul(rows, length)\n"
    places = "down = Unsqueeze(starts, second)\n places = Add(down, at)\n flat = Flatten<axis = 2>(x)\n"
    text = attention(hidden=f"{rows} {places} h = Gather<axis = 0>(flat, places)")
    with pytest.raises(UnsupportedError, match=r"at their addresses in a flattened batch.*indices `places` - at `h`"):
        injected(read(text))


def test_what_mixes_the_sequences_of_a_batch_is_refused_where_some_are_padded():
    text = attention(
        inputs=MASK,
        allowed=f"{BY_MULTIPLYING} {BOTH}",
        after="m = ReduceMean<keepdims = 1>(c, first)\n logits = Add(c, m)",
    )
    with pytest.raises(UnsupportedError, match="mixes the sequences of a batch"):
        injected(read(text))


CODES = """case ({codes}) => (float[b, n, 8] logits)
<float[9, 8] one_table, float[9, 8] other_table, int64 nought = {{0}}, int64 one = {{1}}, int64[1] first = {{0}},
 int64[1] second = {{1}}, float low = {{-10000.0}}>
{{
  c0 = Gather<axis = {axis}>(codes, nought)
  c1 = Gather<axis = {axis}>(codes, one)
  e0 = Gather(one_table, c0)
  e1 = Gather(other_table, c1)
  h = Add(e0, e1)
  sizes = Shape(codes)
  length = Gather(sizes, {place})
  at = Range(nought, length, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  allowed = LessOrEqual(row, column)
  ht = Transpose<perm = [0, 2, 1]>(h)
  s = MatMul(h, ht)
  m = Where(allowed, s, low)
  w = Softmax<axis = -1>(m)
  logits = MatMul(w, h)
}}"""


@pytest.mark.parametrize(
    ("codes", "axis", "dims"),
    [
        ("int64[b, 2, n] codes", 1, ["batch_size", 2, "sequence_length"]),
        ("int64[b, n, 2] codes", 2, ["batch_size", "sequence_length", 2]),
    ],
)
def test_several_codes_for_each_token(codes, axis, dims):
    place = "one" if axis == 2 else "two"
    text = CODES.format(codes=codes, axis=axis, place=place).replace("int64 one =", "int64 two = {2}, int64 one =")
    given = injected(read(text)).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in given] == dims


def test_what_the_export_gives_out_under_the_name_of_a_present_becomes_it():
    original = read(attention(key="present_0_key = Unsqueeze(k0, second)\n k = Squeeze(present_0_key, second)"))
    float_type = onnx.TensorProto.FLOAT
    original.graph.output.append(helper.make_tensor_value_info("present_0_key", float_type, ["b", 1, "n", 8]))
    result = injected(original, present="present_{layer}_{kind}")
    assert [value.name for value in result.graph.output] == ["logits", "present_0_key", "present_0_value"]
    assert verify_models(original, result).problems == ()


def test_relative_places_where_the_export_fixed_the_length():
    text = attention(
        scores='z = Einsum<equation = "bqd,qkd->bqk">(q, table)\n s = Add(s0, z)', constants="float[9, 9, 8] table"
    )
    original = read(text.replace("[b, n, 8]", "[2, 9, 8]"))
    assert_law(original, injected(original))


FACTOR = "f = Where(late, half, unit)\n u = Unsqueeze(f, third)\n h = Mul(x, u)"


def test_positions_that_are_compared_with_a_number_are_given_for_the_new_tokens():
    hidden = f"late = Greater(position_ids, wide)\n {FACTOR}"
    assert_law_of(
        attention(inputs="int64[b, n] position_ids", hidden=hidden, constants="int64 wide = {5}, float unit = {1.0}")
    )


def test_the_last_of_such_positions_is_a_length_that_later_tokens_change():
    hidden = f"last = ReduceMax(position_ids, second)\n late = Greater(last, wide)\n {FACTOR}"
    text = attention(
        inputs="int64[b, n] position_ids", hidden=hidden, constants="int64 wide = {300}, float unit = {1.0}"
    )
    with pytest.raises(UnsupportedError, match="ReduceMax mixes tokens"):
        injected(read(text))
