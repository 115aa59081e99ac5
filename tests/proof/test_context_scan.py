"""Where context changes is found by computing it, whatever the threshold is hidden in."""

# ruff: noqa: E501  # a case is read best on one line

import numpy as np
import onnx
import pytest
from attentions import attention
from onnx import numpy_helper
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.proof import context_scan
from kvsurgeon.proof.row_checks import MAX_RUN
from kvsurgeon.proof.row_runner import RowRunner
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

CAUSAL = "causal = LessOrEqual(row, column)"
POSITIONS = [
    ("a block behind a sum and a bound", "float late = {-699.5}, float end = {-759.5}",
     f"{CAUSAL}\n f = Cast<to = 1>(at)\n a0 = Add(f, late)\n a1 = Relu(a0)\n a = Cast<to = 9>(a1)\n b0 = Add(f, end)\n b1 = Relu(b0)\n"
     "b2 = Cast<to = 9>(b1)\n b = Not(b2)\n in = And(a, b)\n i = Unsqueeze(in, first)\n j = Unsqueeze(in, second)\n both = And(i, j)\n"
     "allowed = Or(causal, both)", 701),
    ("an angle", "float speed = {0.0045}, float near = {0.9999}, int64 four = {4}",
     f"{CAUSAL}\n f = Cast<to = 1>(column)\n a = Mul(f, speed)\n b = Sin(a)\n c1 = Greater(b, near)\n end = Add(column, four)\n d = Less(row, end)\n"
     "e = And(c1, d)\n allowed = Or(causal, e)", 347),
    ("the precision of positions", "", "i0 = Cast<to = 10>(row)\n j0 = Cast<to = 10>(column)\n i = Cast<to = 1>(i0)\n j = Cast<to = 1>(j0)\n allowed = LessOrEqual(i, j)", 2049),
    ("the precision of positions in bfloat16", "", "i0 = Cast<to = 16>(row)\n j0 = Cast<to = 16>(column)\n i = Cast<to = 1>(i0)\n j = Cast<to = 1>(j0)\n allowed = LessOrEqual(i, j)", 257),
    ("an overflow of positions", "int32 factor = {2097152}, int32 zero = {0}, int64 more = {30}",
     f"{CAUSAL}\n i = Cast<to = 6>(column)\n f = Mul(i, factor)\n over = Less(f, zero)\n end = Add(column, more)\n d = Less(row, end)\n"
     "e = And(over, d)\n allowed = Or(causal, e)", 1025),
    ("an overflow of positions beyond those that are all computed", "int32 factor = {430357}",
     "i0 = Cast<to = 6>(row)\n j0 = Cast<to = 6>(column)\n i = Mul(i0, factor)\n j = Mul(j0, factor)\n allowed = LessOrEqual(i, j)", 4991),
    ("the precision of sums", "float factor = {16772216.0}",
     "i0 = Cast<to = 1>(row)\n j0 = Cast<to = 1>(column)\n i = Add(i0, factor)\n j = Add(j0, factor)\n allowed = LessOrEqual(i, j)", 5001),
]  # fmt: skip
LONG = [
    ("an overflow of a product of positions", "",
     "i0 = Cast<to = 6>(row)\n j0 = Cast<to = 6>(column)\n i = Mul(i0, i0)\n j = Mul(j0, j0)\n allowed = LessOrEqual(i, j)", 46341),
    ("an overflow of a cast", "", "i = Cast<to = 5>(row)\n j = Cast<to = 5>(column)\n allowed = LessOrEqual(i, j)", 32768),
]  # fmt: skip
BAND = "a0 = Add(n, begin)\n a1 = Relu(a0)\n a = Cast<to = 9>(a1)\n b0 = Add(n, end)\n b1 = Relu(b0)\n b = Cast<to = 9>(b1)\n c1 = Not(b)\n in = And(a, c1)\n"
LENGTHS = [
    ("a band behind sums and bounds", f"n = Cast<to = 1>(length)\n {BAND} f = Where(in, half, unit)\n s = Mul(s0, f)"),
    ("a band of logarithms", "n = Cast<to = 1>(length)\n l = Log(n)\n a = Greater(l, log_begin)\n b = Less(l, log_end)\n in = And(a, b)\n"
     "f = Where(in, half, unit)\n s = Mul(s0, f)"),
    ("a table of lengths", "before = Sub(length, one)\n f = Gather(lengths, before)\n s = Mul(s0, f)"),
    ("a band of token data", f"n = Cast<to = 1>(length)\n {BAND} other = Mul(s0, half)\n s = Where(in, other, s0)"),
]  # fmt: skip


def read_with(text: str, **tables: np.ndarray) -> onnx.ModelProto:
    model = read(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tables.items())
    return model


@pytest.mark.parametrize(("constants", "allowed", "limit"), [pytest.param(*case[1:], id=case[0]) for case in POSITIONS])
def test_queries_that_read_later_keys_limit_the_length(constants, allowed, limit):
    assert Subject.of(read(attention(constants=constants, allowed=allowed))).proof().limit == limit


@pytest.mark.parametrize(("constants", "allowed", "wrong_from"), [pytest.param(*case[1:], id=case[0]) for case in LONG])
def test_a_long_limit_is_at_most_a_256th_too_short(constants, allowed, wrong_from):
    limit = Subject.of(read(attention(constants=constants, allowed=allowed))).proof().limit
    assert wrong_from * 255 // 256 <= limit <= wrong_from


def test_segments_of_a_table_that_are_read_both_ways_limit_the_length():
    segments = np.zeros(3000, np.int64)
    segments[700:760] = 1
    allowed = (
        f"{CAUSAL}\n s1 = Gather(segments, at)\n i = Unsqueeze(s1, first)\n j = Unsqueeze(s1, second)\n same = Equal(i, j)\n"
        "in = Greater(j, nought)\n both = And(same, in)\n allowed = Or(causal, both)"
    )
    model = read_with(attention(allowed=allowed), segments=segments)
    assert Subject.of(model).proof().limit == 701


def test_verification_passes_the_positions_at_which_context_changes():
    segments = np.zeros(3000, np.int64)
    segments[700:760] = 1
    scores = (
        "s1 = Gather(segments, at)\n i = Unsqueeze(s1, first)\n j = Unsqueeze(s1, second)\n same = Equal(i, j)\n"
        "b = Where(same, half, low)\n s = Add(s0, b)"
    )
    run = run_and_save(read_with(attention(scores=scores), segments=segments), Pipeline((Inject(),)))
    assert {760, 761} <= set(run.thresholds)
    assert "past 760 tokens" in {one.scenario for one in run.verification.comparisons}


def test_verification_passes_the_lengths_at_which_context_changes_once_each():
    constants = "float begin = {-700.5}, float end = {-750.5}"
    scores = f"n = Cast<to = 1>(length)\n {BAND} f = Where(in, half, half)\n s = Mul(s0, f)"
    run = run_and_save(read(attention(constants=constants, scores=scores)), Pipeline((Inject(),)))
    assert {700, 701, 750, 751} <= run.thresholds
    scenarios = {one.scenario for one in run.verification.comparisons}
    assert {"past 700 tokens", "past 750 tokens"} <= scenarios
    assert not {"past 701 tokens", "past 751 tokens"} & scenarios


def test_context_that_runs_for_one_token_only_is_rejected():
    allowed = "t = Gather(first, at)\n e = Equal(row, t)\n causal = LessOrEqual(row, column)\n allowed = And(causal, e)"
    with pytest.raises(UnsupportedError):
        Subject.of(read(attention(allowed=allowed))).proof()


def test_a_distance_of_a_table_that_is_not_masked_limits_the_length():
    distances = np.zeros((6001, 1), np.float32)
    distances[3000 + 2000] = 3e4
    masked = (
        "behind = Sub(row, column)\n place = Add(behind, middle)\n b0 = Gather(distances, place)\n b1 = Transpose<perm = [2, 0, 1]>(b0)\n"
        "m = Where(allowed, s, low)\n masked_scores = Add(m, b1)"
    )
    model = read_with(attention(constants="int64 middle = {3000}", masked=masked), distances=distances)
    assert Subject.of(model).proof().limit == 2000


@pytest.mark.parametrize("scores", [pytest.param(case[1], id=case[0]) for case in LENGTHS])
def test_a_band_of_lengths_limits_the_length(scores):
    constants = (
        f"float begin = {{-1549.5}}, float end = {{-1579.5}}, float log_begin = {{{np.log(1549.5)}}}, "
        f"float log_end = {{{np.log(1579.5)}}}, float unit = {{1.0}}"
    )
    lengths = np.ones(4000, np.float32)
    lengths[1549:1579] = 0.5
    model = read_with(attention(constants=constants, scores=scores), lengths=lengths)
    assert Subject.of(model).proof().limit == 1549


def test_an_update_that_is_added_keeps_the_data():
    written = (
        "n1 = Unsqueeze(length, first)\n size = Concat<axis = 0>(n1, n1)\n i0 = Expand(column, size)\n j0 = Expand(row, size)\n"
        "i = Unsqueeze(i0, third)\n j = Unsqueeze(j0, third)\n places = Concat<axis = 2>(i, j)\n far = Greater(length, limit)\n"
        "f = Where(far, half, none)\n r = Cast<to = 1>(row)\n fr = Mul(f, r)\n data = Expand(fr, size)\n zeros0 = Mul(r, none)\n"
        'zeros = Expand(zeros0, size)\n b = ScatterND<reduction = "add">(data, places, zeros)\n s = Add(s0, b)'
    )
    model = read(attention(constants="int64 limit = {300}, float none = {0.0}", scores=written))
    assert Subject.of(model).proof().limit == 300


def test_a_number_that_overflows_is_not_folded():
    written = "n = Cast<to = 6>(length)\n m = Mul(n, factor)\n over = Less(m, zero)\n f = Where(over, half, unit)\n s = Mul(s0, f)"
    constants = "int32 factor = {2097152}, int32 zero = {0}, float unit = {1.0}"
    assert Subject.of(read(attention(constants=constants, scores=written))).proof().limit == 1023


def test_a_byte_that_overflows_limits_the_length():
    written = "n = Cast<to = 3>(length)\n over = Less(n, zero)\n f = Where(over, half, unit)\n s = Mul(s0, f)"
    model = read(attention(constants="int8 zero = {0}, float unit = {1.0}", scores=written))
    assert Subject.of(model).proof().limit < 128


def test_a_length_that_bfloat16_rounds_limits_the_length():
    written = (
        "n = Cast<to = 1>(length)\n n0 = Cast<to = 16>(n)\n n1 = Cast<to = 1>(n0)\n d = Sub(n, n1)\n f0 = Abs(d)\n f = Add(f0, unit)\n"
        "s = Mul(s0, f)"
    )
    assert Subject.of(read(attention(constants="float unit = {1.0}", scores=written))).proof().limit == 256


def test_a_sign_that_changes_at_forty_tokens_is_rejected():
    written = "n = Cast<to = 1>(length)\n a0 = Add(n, late)\n a1 = Relu(a0)\n a = Cast<to = 9>(a1)\n f = Where(a, half, unit)\n s = Mul(s0, f)"
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        Subject.of(read(attention(constants="float late = {-39.5}, float unit = {1.0}", scores=written))).proof()


def test_one_later_key_in_a_table_of_other_numbers_limits_the_length():
    table = np.random.default_rng(0).standard_normal((900, 900)).astype(np.float32)
    table[550, 553] = 3e4
    masked = (
        "n1 = Unsqueeze(length, first)\n both = Concat<axis = 0>(n1, n1)\n corner = Concat<axis = 0>(first, first)\n"
        "b = Slice(table, corner, both)\n m = Where(allowed, s, low)\n masked_scores = Add(m, b)"
    )
    assert Subject.of(read_with(attention(masked=masked), table=table)).proof().limit == 553


@pytest.mark.parametrize(
    "read_first",
    ["", "shared = Identity(table)\n ", "hidden = Not(table)\n shared = Not(hidden)\n "],
    ids=["stored", "stored, of several layers", "computed"],
)
def test_a_mask_table_with_more_elements_than_are_scanned_is_scanned_by_its_rows(read_first):
    table = np.tri(6000, dtype=bool)
    table[3000, 3003] = True
    allowed = (
        f"{read_first}n1 = Unsqueeze(length, first)\n both = Concat<axis = 0>(n1, n1)\n corner = Concat<axis = 0>(first, first)\n"
        f"allowed = Slice({'shared' if read_first else 'table'}, corner, both)"
    )
    assert Subject.of(read_with(attention(allowed=allowed), table=table)).proof().limit == 3003


def test_rows_of_quantized_weights_are_checked_at_long_lengths():
    """Quantization has three outputs, which the rows are computed from."""
    after = "q8, step, zero = DynamicQuantizeLinear(w0)\n w1 = DequantizeLinear(q8, step, zero)\n w = Identity(w1)"
    text = attention().replace(
        "w = Softmax<axis = -1>(masked_scores)", f"w0 = Softmax<axis = -1>(masked_scores)\n {after}"
    )
    proof = Subject.of(read(text)).proof()
    assert proof.limit is None
    assert proof.patterns[0].checked > 4000


@pytest.mark.parametrize("begin", [70, 300])
@pytest.mark.parametrize(
    ("place", "written"),
    [
        pytest.param("scores", "s = Mul(s0, f)", id="scores"),
        pytest.param("hidden", "n1 = Unsqueeze(n, first)\n p = Mul(column_f, f)\n h = Add(x, p)", id="positions"),
    ],
)
def test_a_band_of_short_lengths_limits_the_length(begin, place, written):
    """Between lengths at which all rows are computed."""
    band = "n = Cast<to = 1>(length)\n column_f = Cast<to = 1>(column)\n l = Log(n)\n a = Greater(l, log_begin)\n b = Less(l, log_end)\n in = And(a, b)\n f = Where(in, half, unit)\n"
    constants = (
        f"float log_begin = {{{np.log(begin - 0.5)}}}, float log_end = {{{np.log(begin + 20.5)}}}, float unit = {{1.0}}"
    )
    model = read(attention(constants=constants, **{place: band + written}))
    assert Subject.of(model).proof().limit == begin - 1


def test_a_mask_that_is_computed_whole_is_scanned_in_runs_of_bounded_size(monkeypatch):
    allowed = (
        "square = Mul(length, length)\n flat = Range(nought, square, one)\n i = Div(flat, length)\n j = Mod(flat, length)\n"
        "n1 = Unsqueeze(length, first)\n both = Concat<axis = 0>(n1, n1)\n le = LessOrEqual(j, i)\n allowed = Reshape(le, both)"
    )
    run, largest = RowRunner.run, []

    def measured(runner, rows, *options, **named):
        largest.append(runner.elements(rows))
        return run(runner, rows, *options, **named)

    monkeypatch.setattr(RowRunner, "run", measured)
    assert Subject.of(read(attention(allowed=allowed))).proof().limit > 2000
    assert max(largest) <= MAX_RUN


def test_rows_that_are_too_large_to_run_beyond_a_threshold_limit_the_length(monkeypatch):
    window = f"{CAUSAL}\n d = Sub(column, row)\n near = Less(d, wide)\n allowed = And(causal, near)"
    text = attention(constants="int64 wide = {1500}", allowed=window)
    assert Subject.of(read(text)).proof().limit is None
    monkeypatch.setattr("kvsurgeon.proof.row_checks.MAX_RUN", 5000)
    assert Subject.of(read(text)).proof().limit == 1024


def test_lengths_that_are_too_expensive_to_look_at_limit_the_length(monkeypatch):
    """A sum over the whole mask costs the square of the length."""
    monkeypatch.setattr(context_scan, "MAX_ELEMENTS_OF_LENGTHS", 1 << 26)
    scores = (
        "pairs = LessOrEqual(row, column)\n p = Cast<to = 1>(pairs)\n l = Mul(p, p)\n sum = ReduceSum<keepdims = 0>(l)\n"
        "n = Cast<to = 1>(length)\n a0 = Add(n, late)\n a1 = Relu(a0)\n a2 = Min(a1, unit)\n part = Mul(sum, a2)\n f = Add(part, unit)\n s = Mul(s0, f)"
    )
    proof = Subject.of(read(attention(constants="float late = {-2000.0}, float unit = {1.0}", scores=scores))).proof()
    assert proof.limit == 256
