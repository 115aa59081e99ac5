"""Experts that select tokens by content: the result of a token must depend on that token alone."""

import numpy as np
import onnxruntime
import pytest
from attentions import assert_law_of, attention, in_order, shuffled
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

# Two experts, as `for expert in experts: out.index_add_(0, tokens, weight * expert(x[tokens]))` is exported.
EXPERTS = """f = Reshape(x, rows)
 score = MatMul(f, router)
 chances = Softmax(score)
 weight, chosen = TopK<axis = -1>(chances, one1)
 fs = Shape(f)
 none = ConstantOfShape<value = float[1] {0.0}>(fs)
 FIRST
 SECOND
 h = Reshape(out1, sizes)"""
EXPERT = """is_N = Equal(chosen, number_N)
 found_N = NonZero(is_N)
 each_N = Transpose<perm = [1, 0]>(found_N)
 token_N, slot_N = Split<axis = 1>(each_N, ones)
 at_N = Squeeze(token_N, second)
 picked_N = Gather(f, at_N)
 made_N = MatMul(picked_N, expert_N)
 share_N = GatherND(weight, each_N)
 wide_N = Unsqueeze(share_N, second)
 part_N = Mul(made_N, wide_N)
 out_N = ScatterND<reduction = "add">(before_N, token_N, part_N)"""
CONSTANTS = """int64[2] rows = {-1, 8}, float[8, 2] router, int64[1] one1 = {1}, int64[2] ones = {1, 1},
 float[8, 8] expert_0, float[8, 8] expert_1, int64 number_0 = {0}, int64 number_1 = {1}"""


def text(expert: str = EXPERT, constants: str = "") -> str:
    first = expert.replace("_N", "_0").replace("before_0", "none")
    second = expert.replace("_N", "_1").replace("before_1", "out_0").replace("out_1 =", "out1 =")
    hidden = EXPERTS.replace("FIRST", first).replace("SECOND", second)
    return attention(hidden=hidden, constants=f"{CONSTANTS}{constants and ', ' + constants}")


def test_experts_that_select_their_tokens():
    assert_law_of(text())


def test_a_row_of_which_only_the_shape_is_read_is_no_selection():
    expert = EXPERT.replace(
        "part_N =",
        "row_N = Slice(before_N, first, second, first)\n row_shape_N = Shape(row_N)\n"
        " part_N = Expand(part1_N, row_shape_N)\n part1_N =",
    )
    assert_law_of(text(expert))


def test_a_note_says_that_routing_is_measured():
    outcome = Inject().apply(Subject.of(in_order(read(text()))))
    assert any("routing" in note for note in outcome.notes)


# As `out[any] += share[any] * expert(x[any])` is exported: one selection for each read, and a scatter of elements.
BY_MASK = """is_N = Equal(chosen, number_N)
 as_int_N = Cast<to = 7>(is_N)
 how_many_N = ReduceSum<keepdims = 0>(as_int_N, minus1)
 any_N = Greater(how_many_N, nought)
 found_N = NonZero(any_N)
 each_N = Transpose<perm = [1, 0]>(found_N)
 picked_N = GatherND(f, each_N)
 made_N = MatMul(picked_N, expert_N)
 flags_N = Cast<to = 1>(is_N)
 shares_N = Mul(weight, flags_N)
 share_N = ReduceSum<keepdims = 0>(shares_N, minus1)
 again_N = NonZero(any_N)
 places_N = Transpose<perm = [1, 0]>(again_N)
 taken_N = GatherND(share_N, places_N)
 wide_N = Unsqueeze(taken_N, second)
 part_N = Mul(made_N, wide_N)
 old_N = GatherND(before_N, places_N)
 new_N = Add(old_N, part_N)
 flat_N = Reshape(new_N, minus1)
 column_N = Unsqueeze(any_N, second)
 all_N = Expand(column_N, fs)
 found_all_N = NonZero(all_N)
 elements_N = Transpose<perm = [1, 0]>(found_all_N)
 elements_shape_N = Shape(elements_N)
 count_N = Slice(elements_shape_N, first, second)
 kept_N = Slice(flat_N, first, count_N)
 out_N = ScatterND(before_N, elements_N, kept_N)"""
MINUS = "int64[1] minus1 = {-1}"


def test_experts_whose_masks_select_several_times():
    assert_law_of(text(BY_MASK, MINUS))


@pytest.mark.parametrize("seed", range(4))
def test_they_are_found_in_any_order_of_the_nodes(seed):
    shape_outside = BY_MASK.replace("(column_N, fs)", "(column_N, before_sizes_N)\n before_sizes_N = Shape(before_N)")
    original = shuffled(in_order(read(text(shape_outside, MINUS))), seed)
    assert_law(original, injected(original))


@pytest.mark.parametrize("end", ["Min(rows_N, limit1)", "Div(rows_N, two1)"])
def test_selections_that_are_cut_are_rejected(end):
    cut = f"""found_shape_N = Shape(every_N)
 rows_N = Slice(found_shape_N, first, second)
 end_N = {end}
 each_N = Slice(every_N, first, end_N, first)"""
    expert = EXPERT.replace("each_N = Transpose<perm = [1, 0]>(found_N)",
                            f"every_N = Transpose<perm = [1, 0]>(found_N)\n {cut}")  # fmt: skip
    model = in_order(read(text(expert, "int64[1] limit1 = {700}, int64[1] two1 = {2}")))
    with pytest.raises(UnsupportedError):
        injected(model)


@pytest.mark.parametrize("condition", ["Equal(length, prime)", "Greater(length, prime)", "Equal(double, twice)"])
@pytest.mark.parametrize("prime", [3, 19, 61, 307])
def test_a_factor_for_some_lengths_is_rejected(condition, prime):
    switched = f"double = Add(length, length)\n is_one = {condition}\n factor = Where(is_one, half, unit)\n "
    expert = EXPERT.replace("Mul(made_N, wide_N)", "Mul(part1_N, factor)\n part1_N = Mul(made_N, wide_N)")
    constants = f"float unit = {{1.0}}, int64 prime = {{{prime}}}, int64 twice = {{{2 * prime}}}"
    model = in_order(read(text(expert, constants).replace("f = Reshape(x, rows)", f"{switched}f = Reshape(x, rows)")))
    with pytest.raises(UnsupportedError):
        injected(model)


def test_experts_that_normalize_over_their_tokens_are_rejected():
    expert = BY_MASK.replace("made_N = MatMul(picked_N, expert_N)",
                             "raw_N = MatMul(picked_N, expert_N)\n made_N = Softmax<axis = 0>(raw_N)")  # fmt: skip
    with pytest.raises(UnsupportedError):
        injected(in_order(read(text(expert, MINUS))))


FIRST = EXPERT.replace("Gather(f, at_N)", "Gather(f, none_N)\n none_N = Sub(at_N, at_N)")
MIXED_IN_EXPERT = EXPERT.replace("(picked_N, expert_N)", "(picked_N, g_N)\n g_N = MatMul(t_N, picked_N)").replace(
    "made_N =", "t_N = Transpose<perm = [1, 0]>(picked_N)\n made_N ="
)
BY_POSITION = EXPERT.replace("Mul(made_N, wide_N)", "Add(made_N, moved_N)").replace(
    "part_N =", "place_N = Cast<to = 1>(token_N)\n moved_N = Mul(place_N, wide_N)\n part_N ="
)
SHIFTED = EXPERT.replace("(before_N, token_N, part_N)", "(before_N, back_N, part_N)").replace(
    "out_N =",
    "size_N = Gather(fs, nought)\n sum_N = Add(token_N, one)\n back_N = Mod(sum_N, size_N)\n out_N =",
)


CUT = EXPERT.replace("each_N = Transpose<perm = [1, 0]>(found_N)", "every_N = Transpose<perm = [1, 0]>(found_N)\n"
                     "each_N = Slice(every_N, nought1, LIMIT1, nought1)")  # fmt: skip
COUNTED_OFF = EXPERT.replace(
    "part_N = Mul(made_N, wide_N)",
    """count1_N = Shape(at_N)
 count_N = Squeeze(count1_N, nought1)
 rank_N = Range(nought, count_N, one)
 kept_N = Less(rank_N, LIMIT)
 kept1_N = Unsqueeze(kept_N, second)
 whole_N = Mul(made_N, wide_N)
 part_N = Where(kept1_N, whole_N, nil)""",
)
CLAMPED = EXPERT.replace("Gather(f, at_N)", "Gather(f, low_N)").replace(
    "picked_N =", "low_N = Min(at_N, LIMIT)\n picked_N =")  # fmt: skip


@pytest.mark.parametrize("limit", [60, 700, 3000])
@pytest.mark.parametrize("changed", [CUT, COUNTED_OFF, CLAMPED], ids=["a slice", "their rank", "a clamped index"])
def test_experts_that_drop_tokens_beyond_a_capacity_are_rejected(changed, limit):
    numbers = (
        f"""int64 limit = {{{limit}}}, int64[1] limit1 = {{{limit}}}, int64[1] nought1 = {{0}}, float nil = {{0.0}}"""
    )
    model = in_order(read(text(changed.replace("LIMIT", "limit"), numbers)))
    with pytest.raises(UnsupportedError):
        injected(model)


@pytest.mark.parametrize(
    "changed",
    [FIRST, MIXED_IN_EXPERT, BY_POSITION, SHIFTED],
    ids=[
        "always the first token",
        "a Gram matrix of the selected tokens",
        "their positions",
        "put back at the next position",
    ],
)
def test_experts_that_mix_tokens_are_rejected(changed):
    model = in_order(read(text(changed)))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"x": np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)})
    with pytest.raises(UnsupportedError, match="may depend on other tokens"):
        injected(model)


# Tokens sorted by expert, each multiplied with the matrix of its expert, and back in their original order.
SORTED = """f = Reshape(x, rows)
 score = MatMul(f, router)
 chosen = ArgMax<axis = -1, keepdims = 0>(score)
 fs = Shape(f)
 many = Slice(fs, first, second)
 ones1, order = TopK<largest = 0>(chosen, many)
 back1, back = TopK<largest = 0>(order, many)
 taken = Gather(f, order)
 LIMITED
 column1 = Unsqueeze(kept, second)
 whose = Gather(experts, ones1)
 made = MatMul(column1, whose)
 flat = Squeeze(made, second)
 put = Gather(flat, back)
 h = Reshape(put, sizes)"""
ALL_KEPT = "kept = Identity(taken)"
FIRST_HUNDRED = """start = Slice(taken, first, hundred)
 rest = Slice(taken, hundred, far)
 gone = Mul(rest, nil)
 kept = Concat<axis = 0>(start, gone)"""
BY_RANK = """rank = Cast<to = 1>(order)
 wide = Unsqueeze(rank, second)
 kept = Mul(taken, wide)"""
UP_TO_A_RANK = """back2 = Less(order, limit)
 wide = Unsqueeze(back2, second)
 kept = Where(wide, taken, nil)"""
OF_SORTED = """int64[2] rows = {-1, 8}, float[8, 2] router, float[2, 8, 8] experts, int64[1] hundred = {100},
 float nil = {0.0}, int64[1] far = {1000000}, int64 limit = {1000}"""


def sorted_text(limited: str = ALL_KEPT) -> str:
    return attention(hidden=SORTED.replace("LIMITED", limited), constants=OF_SORTED)


def test_tokens_sorted_by_expert():
    assert_law_of(sorted_text())


@pytest.mark.parametrize(
    "limited", [FIRST_HUNDRED, BY_RANK, UP_TO_A_RANK], ids=["only the first hundred", "by rank", "up to a rank"]
)
def test_a_result_that_depends_on_the_rank_is_rejected(limited):
    with pytest.raises(UnsupportedError, match=r"mixes tokens|may depend on other tokens"):
        injected(in_order(read(sorted_text(limited))))


# The number of tokens of each expert splits the sorted tokens.
COUNTED = """f = Reshape(x, rows)
 score = MatMul(f, router)
 chosen = ArgMax<axis = -1, keepdims = 1>(score)
 fs = Shape(f)
 many = Slice(fs, first, second)
 ss = Shape(score)
 none = ConstantOfShape<value = float[1] {0.0}>(ss)
 cs = Shape(chosen)
 unit = ConstantOfShape<value = float[1] {1.0}>(cs)
 hot = ScatterElements<axis = 1>(none, chosen, unit)
 whole = Cast<to = 7>(hot)
 count = ReduceSum<keepdims = 0>(whole, first)
 alone = Squeeze(chosen, second)
 sorted, order = TopK<largest = 0>(alone, many)
 taken = Gather(f, order)
 mine, theirs = Split<axis = 0>(taken, count)
 made_mine = MatMul(mine, expert_0)
 made_theirs = MatMul(theirs, expert_1)
 made = Concat<axis = 0>(made_mine, made_theirs)
 zeros = ConstantOfShape<value = float[1] {0.0}>(fs)
 places = Unsqueeze(order, second)
 put = ScatterND(zeros, places, made)
 h = Reshape(put, sizes)"""


def test_tokens_split_by_the_counts_of_experts():
    constants = "int64[2] rows = {-1, 8}, float[8, 2] router, float[8, 8] expert_0, float[8, 8] expert_1"
    assert_law_of(attention(hidden=COUNTED, constants=constants))
