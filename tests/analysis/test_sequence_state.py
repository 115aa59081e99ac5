"""Sequence states: the inputs of convolutions, token shifts and running sums are cached."""

import onnx
import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from laws import assert_law, dims_of, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache, reattach_cache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Subject
from kvsurgeon.workflow import verification
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

FLOAT = onnx.TensorProto.FLOAT
KERNEL = """float[8, 1, 3] kernel, int8[8, 1, 3] kernel8, float nil = {0.0},
 int64[6] shift = {0, 1, 0, 0, -1, 0},
 int64[6] before = {0, 1, 0, 0, 0, 0},
 int64[6] after = {0, 0, 0, 0, 1, 0}, int64[1] minus = {-1}, int64[1] far = {99999999999},
 int64[2] rows = {3, 8}, int64[1] rows3 = {3}, int64[1, 1, 8] places = {0, 0, 0, 0, 0, 0, 0, 0},
 int64[2] heads = {1, 2}, int64[1] width = {8}"""
CONVOLUTION = """xt = Transpose<perm = [0, 2, 1]>(x)
 y = Conv<group = 8, kernel_shape = [3], pads = [2, 0]>(xt, kernel)
 h = Transpose<perm = [0, 2, 1]>(y)"""
TRIMMED = """xt = Transpose<perm = [0, 2, 1]>(x)
 y = Conv<group = 8, kernel_shape = [3], pads = [2, 2]>(xt, kernel)
 length1 = Unsqueeze(length, first)
 z = Slice(y, first, length1, third)
 h = Transpose<perm = [0, 2, 1]>(z)"""
# as onnxruntime quantizes it to 8 bits, with the range of all tokens of a call
QUANTIZED = """xt = Transpose<perm = [0, 2, 1]>(x)
 u, us, up = DynamicQuantizeLinear(xt)
 i = ConvInteger<group = 8, kernel_shape = [3], pads = [2, 0]>(u, kernel8, up)
 f = Cast<to = 1>(i)
 both = Mul(us, half)
 y = Mul(f, both)
 h = Transpose<perm = [0, 2, 1]>(y)"""
QUANTIZED_TWICE = QUANTIZED.replace("[2, 0]", "[4, 0]").replace(
    "y = Mul(f, both)",
    """m = Mul(f, both)
 u2, us2, up2 = DynamicQuantizeLinear(m)
 i2 = ConvInteger<group = 8, kernel_shape = [3]>(u2, kernel8, up2)
 f2 = Cast<to = 1>(i2)
 y = Mul(f2, us2)""",
)
BOTH_SIDES = CONVOLUTION.replace("[2, 0]", "[1, 1]")
PADDED = "y = Pad(x, shift, nil)\n h = Sub(x, y)"
PADDED_AND_SLICED = "p = Pad(x, before)\n h = Slice(p, first, minus, second)"
TILED = """n1 = Unsqueeze(length, first)
 r = Concat<axis = 0>(second, n1, second)
 t = Tile(x, r)
 h = Slice(t, first, n1, second)"""
FROM_THE_FIRST = "i = GatherElements<axis = 1>(x, places)\n h = Sub(x, i)"
SUMMED = "c8 = CumSum(x, one)\n h = Mul(c8, half)"
DILATED = CONVOLUTION.replace("pads = [2, 0]", "pads = [6, 0], dilations = [3]")
SHIFTED = """b0 = Slice(sizes, first, second)
 b1 = Concat<axis = 0>(b0, rows)
 zeros = Expand(nil, b1)
 p = Concat<axis = 1>(zeros, x)
 n1 = Unsqueeze(length, first)
 z = Slice(p, first, n1, second)
 h = Sub(x, z)"""
LOOK_ALIKES = {
    "padding that is not zero": "y = Pad(x, shift, half)\n h = Sub(x, y)",
    "a first token that is replaced": "z = Slice(x, second, far, second)\n y = Pad(z, before, nil)\n h = Sub(x, y)",
    "the first token before it": "z = Slice(x, first, second, second)\n z1 = Concat<axis = 1>(z, x)\n"
    " y = Slice(z1, first, minus, second)\n h = Sub(x, y)",
}
LAST_REPLACED = """n0 = Sub(length, one)
 n1 = Unsqueeze(n0, first)
 z = Slice(x, first, n1, second)
 h = Pad(z, after, nil)"""
FILLED = """n1 = Unsqueeze(length, first)
 missing = Neg(n1)
 more = Mod(missing, rows3)
 none = Constant<value_ints = [0, 0, 0, 0]>()
 none1 = Constant<value_ints = [0]>()
 pads = Concat<axis = 0>(none, more, none1)
 chunks = Pad(x, pads, nil)
 sum = CumSum(chunks, one)
 h = Slice(sum, first, n1, second)"""
# torch.roll(x, 1, 1) and y[:, {0}] = 0 as TorchScript writes it: indices and zeros from shapes of the result
ROLLED = """z0 = Slice(x, minus, far, second)
 z1 = Slice(x, first, minus, second)
 z = Concat<axis = 1>(z0, z1)
 part = Gather<axis = 1>(z, nought)
 part_sizes = Shape(part)
 zeros = Expand(nil, part_sizes)
 all_sizes = Shape(z)
 batch = Gather(all_sizes, nought)
 sequences = Range(nought, batch, one)
 b1 = Unsqueeze(sequences, second)
 nil1 = Mul(b1, nought)
 place = Add(nil1, {0})
 at0 = Concat<axis = 1>(b1, place)
 y = ScatterND(z, at0, zeros)
 h = Sub(x, y)"""
FIRST_REPLACED = """all_sizes = Shape(x)
 batch = Gather(all_sizes, nought)
 sequences = Range(nought, batch, one)
 b1 = Unsqueeze(sequences, heads)
 nil1 = Mul(b1, nought)
 at0 = Concat<axis = 2>(b1, nil1)
 whole = Concat<axis = 0>(all_batch, second, width)
 all_batch = Gather(all_sizes, first)
 token = Expand(half, whole)
 h = ScatterND(x, at0, token)"""
REVERSED_SUM = "c8 = CumSum<reverse = 1>(x, one)\n h = Mul(c8, half)"


# x[p - 2], x[p - 1] and x[p] of each position p, next to each other, as `unfold` is exported
UNFOLDED = """p = Pad(x, PADS, nil)
 ps = Shape(p)
 p1 = Gather(ps, one)
 starts = Sub(p1, two)
 from0 = Range(nought, starts, one)
 from1 = Unsqueeze(from0, second)
 window = Add(from1, offsets)
 u = Gather<axis = 1>(p, window)
 f = Slice(u, minus, far_back, third, minus)
 t = Mul(f, taps)
 h = ReduceSum<keepdims = 0>(t, third)"""
UNFOLDING = """int64[6] two_before = {0, 2, 0, 0, 0, 0}, int64[6] two_after = {0, 0, 0, 0, 2, 0}, int64 two = {2},
 int64[1, 3] offsets = {0, 1, 2}, int64[1] far_back = {-9223372036854775807}, float[3, 1] taps"""
MARKED = "g = Gather<axis = 2>(x, nought)\n p = Greater(g, nil)\n c9 = Cast<to = 7>(p)\n"
COUNTED = {
    "tokens that are marked": "s9 = CumSum(c9, one)",
    "and no others": "s8 = CumSum(c9, one)\n s7 = Mul(s8, c9)\n s9 = Add(s7, one)",
    "marked tokens before": "s9 = CumSum<exclusive = 1>(c9, one)",
}
POSITIONS = "float[300, 8] table"


def case(hidden: str, **parts: str) -> str:
    return attention(hidden=hidden, constants=KERNEL, **parts)


def states_of(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    """Return the shapes of the cache inputs after keys and values."""
    return {value.name: dims_of(value) for value in model.graph.input if "state" in value.name}


@pytest.mark.parametrize("hidden", [TILED, FROM_THE_FIRST, SUMMED])
def test_operators_that_read_all_earlier_tokens_have_a_state_of_a_row_for_each(hidden):
    assert_law_of(case(hidden))
    assert states_of(injected(read(case(hidden)))) == {
        "past_key_values.0.state": ["batch_size", 1, "past_sequence_length", 8]
    }


@pytest.mark.parametrize(
    ("hidden", "rows"),
    [(CONVOLUTION, 2), (DILATED, 6), (TRIMMED, 2), (PADDED, 1), (PADDED_AND_SLICED, 1), (SHIFTED, 3)],
)
def test_operators_that_read_a_window_have_a_state_of_the_last_rows(hidden, rows):
    original = read(case(hidden))
    model = injected(original)
    assert states_of(model) == {"past_key_values.0.conv_state": ["batch_size", 1, rows, 8]}
    for length in (2, 9, 23):
        assert_law(original, model, whole=texts(original, length=length), cuts=range(1, length, 1 + length // 9))


@pytest.mark.parametrize(("hidden", "rows"), [(QUANTIZED, 2), (QUANTIZED_TWICE, 4)])
def test_a_convolution_in_8_bits_has_a_state_of_the_last_rows_before_quantization(hidden, rows):
    original = read(case(hidden))
    model = injected(original)
    assert states_of(model) == {"past_key_values.0.conv_state": ["batch_size", 1, rows, 8]}
    assert next(one for one in model.graph.input if "conv_state" in one.name).type.tensor_type.elem_type == FLOAT
    report = verify(original, model, threads=1, effort="quick")
    assert (report.verdict, report.arithmetic) == ("same", "dynamic")
    assert report.error < 1e-4  # without rounding to 8 bits
    assert any("dynamic quantization" in note for note in Inject().apply(Subject.of(original)).notes)


def test_a_convolution_in_8_bits_that_reads_later_tokens_is_rejected():
    with pytest.raises(UnsupportedError, match="ConvInteger mixes tokens along the sequence outside attention"):
        injected(read(case(QUANTIZED.replace("[2, 0]", "[1, 1]"))))


def test_a_range_that_is_read_as_a_number_is_found_by_verification():
    original = read(case(QUANTIZED.replace("Mul(us, half)", "Mul(us, us)")))
    assert verify(original, injected(original), threads=1, effort="quick").verdict == "different"


@pytest.mark.parametrize("hidden", LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_a_window_that_depends_on_where_the_text_starts_is_cached_as_a_whole(hidden):
    """Rows of zeros before the text would not be the same as no tokens."""
    assert_law_of(case(hidden))
    assert "past_key_values.0.conv_state" not in states_of(injected(read(case(hidden))))


def test_tokens_that_are_rolled_have_a_state_if_the_first_is_replaced():
    assert_law_of(case(ROLLED.format("nought")))


def test_a_first_token_that_is_overwritten_is_not_overwritten_in_each_call():
    model = in_order(read(case(FIRST_REPLACED)))
    assert_law(model, injected(model))


def test_no_length_is_declared_of_a_value_of_which_only_the_batch_is_read():
    filled = "x_sizes = Shape(x)\n z = ConstantOfShape(x_sizes)\n all_sizes = Shape(z)"
    model = in_order(read(case(FIRST_REPLACED.replace("all_sizes = Shape(x)", filled))))
    result = injected(onnx.shape_inference.infer_shapes(model, data_prop=True))
    assert any(value.name == "h" for value in result.graph.value_info)
    assert all(value.name != "z" or not value.type.tensor_type.HasField("shape") for value in result.graph.value_info)


@pytest.mark.parametrize("place", ["one", "n9"])
def test_tokens_that_are_rolled_are_rejected_if_another_is_replaced(place):
    with pytest.raises(UnsupportedError, match="selects tokens by their position"):
        injected(read(case("n9 = Sub(length, one)\n " + ROLLED.format(place))))


def test_a_state_that_attention_reads_too_is_cached_as_a_whole():
    key = "k = Identity(k0)\n k1 = Pad(k, shift, nil)\n k2 = MatMul(k1, wk)"
    text = case("h = Identity(x)", key=key, after="logits = Add(c, k2)")
    assert_law_of(text)
    assert not states_of(injected(read(text)))


def test_windows_that_are_gathered_have_a_state():
    hidden = UNFOLDED.replace("PADS", "two_before")
    text = attention(hidden=hidden, constants=f"{KERNEL}, {UNFOLDING}")
    assert_law_of(text)
    assert states_of(injected(read(text))) == {"past_key_values.0.conv_state": ["batch_size", 1, 2, 8]}
    hidden = UNFOLDED.replace("PADS", "two_after")
    with pytest.raises(UnsupportedError):
        injected(read(attention(hidden=hidden, constants=f"{KERNEL}, {UNFOLDING}")))


def counting(count: str) -> str:
    hidden = f"{MARKED} {count}\n e = Gather(table, s9)\n h = Add(x, e)"
    return attention(hidden=hidden, constants=f"{KERNEL}, {POSITIONS}")


@pytest.mark.parametrize("count", COUNTED.values(), ids=COUNTED.keys())
def test_positions_that_count_some_tokens_have_a_state_of_one_flag(count):
    assert_law_of(counting(count))
    state = injected(read(counting(count))).graph.input[-1]
    assert state.name == "past_key_values.0.state"
    assert state.type.tensor_type.elem_type == onnx.TensorProto.BOOL
    assert [dim.dim_value for dim in state.type.tensor_type.shape.dim][1::2] == [1, 1]


@pytest.mark.parametrize("count", ["s9 = CumSum<reverse = 1>(c9, one)", "s9 = ReduceSum(c9, second)"])
def test_positions_that_count_later_tokens_are_rejected(count):
    with pytest.raises(UnsupportedError):
        injected(read(counting(count)))


def test_keys_may_depend_on_earlier_tokens():
    assert_law_of(case("h = Identity(x)", key="k1 = Pad(k0, shift, nil)\n k = Sub(k0, k1)"))


def test_a_note_says_that_the_state_is_measured():
    """Unless the axes of its operators show that no token depends on a later one."""
    for hidden, measured in ((TILED, True), (CONVOLUTION, False)):
        notes = Inject().apply(Subject.of(read(case(hidden)))).notes
        assert any("state outside attention" in note for note in notes) is measured


@pytest.mark.parametrize("hidden", [BOTH_SIDES, REVERSED_SUM])
def test_operators_that_read_later_tokens_are_rejected(hidden):
    with pytest.raises(UnsupportedError, match="mixes tokens along the sequence outside attention"):
        injected(read(case(hidden)))


@pytest.mark.parametrize("condition", ["Equal(length, prime)", "Greater(length, prime)", "Equal(double, twice)"])
@pytest.mark.parametrize("prime", [3, 19, 61, 307])
def test_a_factor_for_some_lengths_is_rejected(condition, prime):
    switched = f"""double = Add(length, length)
 is_one = {condition}
 factor = Where(is_one, half, unit)
 y1 = Mul(y, factor)"""
    hidden = TRIMMED.replace(" length1 =", f" {switched}\n length1 =").replace("Slice(y,", "Slice(y1,")
    constants = f"{KERNEL}, float unit = {{1.0}}, int64 prime = {{{prime}}}, int64 twice = {{{2 * prime}}}"
    with pytest.raises(UnsupportedError, match="mixes tokens along the sequence outside attention"):
        injected(read(attention(hidden=hidden, constants=constants)))


def test_texts_that_are_filled_up_to_whole_chunks_are_rejected():
    with pytest.raises(UnsupportedError, match=r"as those that fill up a chunk; .* found -length . 3.floor"):
        injected(read(case(FILLED)))


def test_a_last_token_that_is_replaced_is_rejected():
    with pytest.raises(UnsupportedError, match="selects tokens by their position"):
        injected(read(case(LAST_REPLACED)))


@pytest.mark.parametrize("cache", ["dynamic", "static", "new-tokens"])
def test_each_cache_mode_supports_states(cache):
    original = read(case(CONVOLUTION))
    assert verification.verify_models(original, injected(original, cache=cache)).verdict == "same"


ACROSS = ("kv_heads", "batch", "head_dim", "sequence")
FORMS = [
    {"cache": "static"},
    {"key_layout": ACROSS},
    {
        "cache": "static",
        "value_layout": ACROSS,
        "past": "past_{kind}_{layer}_in",
        "present": "past_{kind}_{layer}_out",
    },
    {"cache": "new-tokens", "key_layout": ACROSS},
]


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_is_restored_with_its_state(form):
    """A state has the cache layout of values."""
    model = injected(read(case(CONVOLUTION)), **form)
    assert verification.verify_models(read(case(CONVOLUTION)), model).verdict == "same"
    subject = Subject.of(model)
    signature = detach_cache(subject)
    reattach_cache(subject, signature)
    result = io.to_proto(subject.model)
    for before, after in ((model.graph.input, result.graph.input), (model.graph.output, result.graph.output)):
        assert list(before) == list(after)
    assert verification.verify_models(model, result).verdict == "same"


def test_retarget_changes_the_mode_of_a_state():
    done = run_and_save(injected(read(case(CONVOLUTION))), Pipeline((Retarget(cache="static"),)))
    assert done.verification.verdict == "same"


def test_facts_list_the_state():
    decoder = Subject.of(injected(read(case(CONVOLUTION)))).decoder()
    assert [(one.kind, one.layer) for one in decoder.cache] == [("key", 0), ("value", 0), ("conv_state", 0)]
    assert decoder.cache_bytes_per_token == 2 * 8 * 4


def test_remove_cache_removes_the_state():
    subject = Subject.of(injected(read(case(CONVOLUTION))))
    RemoveCache().apply(subject)
    assert [value.name for value in subject.model.graph.inputs] == ["x"]


def test_unfilled_rows_are_rejected():
    with pytest.raises(UnsupportedError, match="would read them as tokens"):
        injected(read(case(SUMMED)), cache="new-tokens", past_length="input")


def test_unfilled_rows_are_not_those_of_a_window():
    original = read(case(CONVOLUTION))
    model = injected(original, cache="new-tokens", past_length="input")
    assert verification.verify_models(original, model).verdict == "same"


MASKED = "visible = Cast<to = 9>(key_mask)\n causal = LessOrEqual(row, column)\n allowed = And(causal, visible)"
MASK = "key_mask = Unsqueeze(attention_mask, second)"
AFTER = """ct = Transpose<perm = [0, 2, 1]>(c{0})
 y = Conv<group = 8, kernel_shape = [3], pads = [2, 0]>(ct, kernel)
 logits = Transpose<perm = [0, 2, 1]>(y)"""
ZEROED = "am = Cast<to = 1>(attention_mask)\n am3 = Unsqueeze(am, third)\n c1 = Mul(c, am3)\n "


def padded(after: str) -> str:
    return case("h = Identity(x)", inputs="int64[b, n] attention_mask", allowed=f"{MASK}\n {MASKED}", after=after)


def test_padding_that_is_zeroed_before_a_convolution_is_accepted():
    original = read(padded(ZEROED + AFTER.format("1")))
    assert_law(original, injected(original))


def test_padding_that_is_zeroed_before_a_projection_in_8_bits_is_accepted():
    """Masked tokens may change the range in which tokens are quantized, as they do in a projection."""
    projected = """ q1, s1, p1 = DynamicQuantizeLinear(c1)
 c2 = MatMulInteger(q1, square8, p1)
 c3 = Cast<to = 1>(c2)
 c4 = Mul(c3, s1)
 """
    text = padded(ZEROED + projected + AFTER.format("4"))
    assert injected(read(text.replace("int8[8, 1, 3]", "int8[8, 8] square8, int8[8, 1, 3]")))


def test_padding_that_a_convolution_reads_is_rejected():
    with pytest.raises(UnsupportedError, match="depend on them outside attention"):
        injected(read(padded(AFTER.format(""))))


def test_a_model_without_attention_is_rejected_for_the_operator_that_mixes_tokens():
    text = (
        "case (float[b, n, 8] x) => (float[b, n, 8] logits) <int64 one = {1}> { y = CumSum(x, one) logits = Add(x, y) }"
    )
    with pytest.raises(
        UnsupportedError, match="CumSum mixes tokens along the sequence, and the graph has no attention"
    ):
        injected(read(text))


COUNTED = """number = ReduceSum<keepdims = 0>(x, third)
 mine = Unsqueeze(number, third)
 theirs = Unsqueeze(number, second)
 same = Equal(mine, theirs)
 earlier = LessOrEqual(row, column)
 both = And(same, earlier)
 ones = Cast<to = 1>(both)
 count = ReduceSum(ones, third)
 h = Add(x, count)"""


def test_counting_tokens_is_rejected_by_name():
    with pytest.raises(UnsupportedError, match="counted by comparing all tokens"):
        injected(in_order(read(attention(hidden=COUNTED))))
