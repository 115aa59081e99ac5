"""What only long texts show, of which some rows are computed: larger batches, other numbers, hidden keys."""

import pytest
from attentions import attention, in_order
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject

SWITCH = 300  # position of the last query that is causal; the next one has no later key in a text of 302 tokens
NUMBERS = f"int64 switch = {{{SWITCH}}}, int64 ahead = {{3}}, int64 five = {{5}}, int64[2] last = {{1, 2}}"
NEAR = "far = Add(column, ahead)\n near = Less(row, far)\n late = Greater(column, switch)"
CAUSAL = "causal = LessOrEqual(row, column)"


def limit_of(allowed: str, **parts: str) -> int | None:
    """Return the longest text that is proved to be right, in tokens."""
    text = attention(allowed=f"{NEAR}\n {CAUSAL}\n {allowed}", constants=f"{NUMBERS}, float zero = {{0.0}}", **parts)
    return Subject.of(in_order(read(text))).proof().limit


def test_a_third_sequence_that_reads_later_keys_limits_the_length():
    batch = "size = Slice(sizes, first, second)\n count = Squeeze(size)\n numbers = Range(nought, count, one)"
    third = f"{batch}\n of_batch = Unsqueeze(numbers, last)\n third_row = Greater(of_batch, one)"
    opened = f"{third}\n here = And(late, third_row)\n ahead_too = And(here, near)"
    assert limit_of(f"{opened}\n allowed = Or(causal, ahead_too)") == SWITCH + 2


def test_a_number_that_opens_later_keys_limits_the_length():
    opened = "large = Greater(number, five)\n here = And(late, large)\n ahead_too = And(here, near)"
    assert limit_of(f"{opened}\n allowed = Or(causal, ahead_too)", inputs="int64[1] number") == SWITCH + 2


def test_tokens_that_hide_all_keys_of_a_late_query_limit_the_length():
    shown = "feature = Gather<axis = 2>(x, nought)\n shown = Greater(feature, zero)\n own = Unsqueeze(shown, second)"
    itself = "same = Equal(row, column)\n early = Not(late)\n kept = And(same, early)\n either = Or(own, kept)"
    assert limit_of(f"{shown}\n {itself}\n allowed = And(causal, either)") == SWITCH + 2


def test_no_limit_without_a_switch():
    shown = "feature = Gather<axis = 2>(x, nought)\n shown = Greater(feature, zero)\n own = Unsqueeze(shown, second)"
    windowed = "start = Sub(column, switch)\n window = Greater(row, start)\n inside = And(causal, window)"
    itself = "same = Equal(row, column)\n either = Or(own, same)"
    assert limit_of(f"{shown}\n {windowed}\n {itself}\n allowed = And(inside, either)") is None


BATCH = "size = Slice(sizes, first, second)\n count = Squeeze(size)\n numbers = Range(nought, count, one)"
THIRD = f"{BATCH}\n of_batch = Unsqueeze(numbers, last)\n other = Greater(of_batch, one)"
LARGE = "other = Greater(number, five)"
LATE = "late_too = Greater(length, switch)\n both = And(other, late_too)\n factor = Where(both, two, unit)"
BY_LENGTH = "length_too = CastLike(length, unit)\n factor = Where(other, length_too, unit)"


def limit_of_factor(factor: str, inputs: str) -> int | None:
    """Return the longest text that is proved to be right if the hidden states have a factor, in tokens."""
    parts = {
        "hidden": f"{factor}\n h = Mul(x, factor)",
        "inputs": inputs,
        "allowed": CAUSAL.replace("causal", "allowed"),
    }
    text = attention(constants=f"{NUMBERS}, float unit = {{1.0}}, float two = {{2.0}}", **parts)
    return Subject.of(in_order(read(text))).proof().limit


@pytest.mark.parametrize(("other", "inputs"), [(THIRD, ""), (LARGE, "int64[1] number")], ids=["batch", "number"])
def test_a_factor_of_others_in_long_texts_limits_the_length(other, inputs):
    assert limit_of_factor(f"{other}\n {LATE}", inputs) == SWITCH


@pytest.mark.parametrize(("other", "inputs"), [(THIRD, ""), (LARGE, "int64[1] number")], ids=["batch", "number"])
def test_a_factor_of_others_that_is_the_length_is_rejected(other, inputs):
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        limit_of_factor(f"{other}\n {BY_LENGTH}", inputs)


COUNTS = "tokens = ReduceSum<keepdims = 1>(attention_mask, second)"
AT_ONE_SEQUENCE = {
    "the shortest": f"{COUNTS}\n least = ReduceMin<keepdims = 1>(tokens)\n is_least = Equal(tokens, least)\n"
    " other = Unsqueeze(is_least, third)",
    "the first": "row0 = Gather(attention_mask, nought)\n start = Gather(row0, nought)\n other = Equal(start, nought)",
}


@pytest.mark.parametrize("other", AT_ONE_SEQUENCE.values(), ids=AT_ONE_SEQUENCE.keys())
def test_a_factor_by_the_mask_of_another_sequence_is_rejected(other):
    factor = f"{other}\n factor = Where(other, two, unit)"
    with pytest.raises(UnsupportedError, match="changes another sequence of the batch"):
        limit_of_factor(factor, "int64[b, n] attention_mask")


def test_a_factor_of_the_shorter_sequences_in_long_texts_limits_the_length():
    """If all sequences have as much padding, none has less tokens than the fullest."""
    shorter = f"{COUNTS}\n most = ReduceMax<keepdims = 1>(tokens)\n fewer = Less(tokens, most)"
    other = f"{shorter}\n other = Unsqueeze(fewer, third)"
    assert limit_of_factor(f"{other}\n {LATE}", "int64[b, n] attention_mask") == SWITCH


def sums_by(triangle: str, inputs: str = "") -> str:
    """Return the text of a decoder that adds up hidden states with a matrix of context before attention."""
    sums = f"early = LessOrEqual(row, column)\n {triangle}\n weights = CastLike(open, x)\n h = MatMul(weights, x)"
    return attention(constants=NUMBERS, allowed="allowed = LessOrEqual(row, column)", hidden=sums, inputs=inputs)


def test_sums_over_tokens_that_a_number_opens_are_rejected():
    assert Subject.of(in_order(read(sums_by("open = Identity(early)")))).proof().limit is None
    opened = sums_by("large = Greater(number, five)\n open = Or(early, large)", "int64[1] number")
    with pytest.raises(UnsupportedError, match="mixes tokens"):
        Subject.of(in_order(read(opened))).proof()


PADDED = "shown = Cast<to = 9>(attention_mask)\n hidden = Not(shown)\n padded = Unsqueeze(hidden, second)"
MASK = "int64[b, n] attention_mask"
TEXT_IS_LONG = "late = Greater(length, switch)"
QUERY_IS_LATE = "late = Greater(column, switch)"


@pytest.mark.parametrize(
    ("opened", "inputs"),
    [
        (f"{THIRD}\n open = Or(early, other)", ""),
        (f"{QUERY_IS_LATE}\n open = Or(early, late)", ""),
        (f"{TEXT_IS_LONG}\n open = Or(early, late)", ""),
        (f"{THIRD}\n {QUERY_IS_LATE}\n here = And(late, other)\n open = Or(early, here)", ""),
        (f"{PADDED}\n {QUERY_IS_LATE}\n here = And(late, padded)\n open = Or(early, here)", MASK),
        (f"{PADDED}\n {TEXT_IS_LONG}\n here = And(late, padded)\n open = Or(early, here)", MASK),
    ],
    ids=["third sequence", "late", "long", "late third sequence", "late padding", "padding of long texts"],
)
def test_sums_over_tokens_that_are_open_in_long_texts_are_rejected(opened, inputs):
    with pytest.raises(UnsupportedError, match="mixes tokens"):
        Subject.of(in_order(read(sums_by(opened, inputs)))).proof()


def test_a_mask_of_unknown_size_is_not_computed_for_texts_that_it_would_fill_memory_at():
    """The size of its queries is not known, so all of them are computed for each row."""
    known = "is_huge = Equal(whole, huge)\n ones = Div(whole, whole)\n target = Where(is_huge, ones, whole)"
    text = attention(
        inputs="int64[b, n] m", constants=f"int64[3] huge = {{{', '.join([str(1 << 62)] * 3)}}}",
        allowed="causal = LessOrEqual(row, column)\n real = Cast<to = 9>(m)\n keys = Unsqueeze(real, second)\n"
        "b1 = Slice(sizes, first, second)\n n1 = Slice(sizes, second, third)\n whole = Concat<axis = 0>(b1, n1, n1)\n"
        f"{known}\n of_all = Expand(keys, target)\n allowed = And(causal, of_all)",
    )  # fmt: skip
    assert Subject.of(read(text)).proof().limit == 1537  # tokens; the next length would have 2 * 2049 ** 2 elements


SUMS = "summed = ReduceSum<keepdims = 0>(m, second)\n most = ReduceMax<keepdims = 0>(summed)"
PADDED = f"{SUMS}\n least = ReduceMin<keepdims = 0>(summed)\n gap = Sub(most, least)\n other = Greater(gap, many)"
MASKED = "real = Cast<to = 9>(m)\n keys = Unsqueeze(real, second)\n causal = LessOrEqual(row, column)"
BY_PART = "long = Cast<to = 1>(length)\n share = Mul(long, part)\n factor = Where(other, share, half)"


@pytest.mark.parametrize(
    "parts",
    [
        {"scores": f"{PADDED}\n {BY_PART}\n s = Mul(s0, factor)"},
        {"after": f"{PADDED}\n {BY_PART}\n logits = Mul(c, factor)"},
        {"scores": f"{SUMS}\n gap = Sub(length, summed)\n all = Greater(gap, many)\n other = Unsqueeze(all, places)\n"
         f" {BY_PART}\n s = Mul(s0, factor)"},
    ],
    ids=["scores, of sequences", "result, of sequences", "scores, of a sequence"],
)  # fmt: skip
def test_a_factor_of_the_length_if_there_is_much_padding_limits_the_length(parts):
    constants = "int64 many = {100}, int64[2] places = {1, 2}, float part = {0.01}"
    text = attention(
        allowed=f"{MASKED}\n allowed = And(causal, keys)", inputs="int64[b, n] m", constants=constants, **parts
    )
    subject = Subject.of(in_order(read(text)))
    assert 100 <= (subject.proof().limit or 0) <= 103
