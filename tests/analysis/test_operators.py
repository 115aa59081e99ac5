"""Operators that keep tokens apart, and context however it is dim_names: each is injected, and the law asked of it."""

# ruff: noqa: E501  # a case is read best on one line

import numpy as np
import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject

# From x [b, n, 8] to h [b, n, 8].
ON_TOKENS = [
    ("Transpose back and forth", "t = Transpose(x)\n h = Transpose<perm = [2, 1, 0]>(t)", ""),
    ("Flatten and Reshape by lengths", "f = Flatten<axis = 2>(x)\n g = MatMul(f, wq)\n h = Reshape(g, sizes)", ""),
    ("Squeeze and Unsqueeze", "u = Unsqueeze(x, second)\n h = Squeeze(u, second)", ""),
    ("Split and Concat of features", "a, z = Split<axis = 2, num_outputs = 2>(x)\n h = Concat<axis = 2>(z, a)", ""),
    ("Concat with a constant row", "o = Expand(half, wide)\n wide = Concat<axis = 0>(bn, four)\n bn = Slice(sizes, first, third)\n"
     "p = Concat<axis = 2>(x, o)\n h = MatMul(p, w12)", "int64[1] four = {4}, float[12, 8] w12"),
    ("Concat of one", "h = Concat<axis = 1>(x)", ""),
    ("Concat with nothing", "bs = Slice(sizes, first, second)\n sh = Concat<axis = 0>(bs, none8)\n none = ConstantOfShape<value = float[1] {0.0}>(sh)\n h = Concat<axis = 1>(none, x)", "int64[2] none8 = {0, 8}"),
    ("Slice of features", "a = Slice(x, first, four, third)\n h = Concat<axis = 2>(a, a)", "int64[1] four = {4}"),
    ("Slice of all tokens", "h = Slice(x, first, end, second)", "int64[1] end = {9223372036854775807}"),
    ("Slice to the length itself", "n1 = Unsqueeze(length, first)\n h = Slice(x, first, n1, second)", ""),
    ("Pad of features", "p = Pad(x, pads)\n h = MatMul(p, w12)", "int64[6] pads = {0, 0, 2, 0, 0, 2}, float[12, 8] w12"),
    ("Gather of features", "h = Gather<axis = 2>(x, order)", "int64[8] order = {7, 6, 5, 4, 3, 2, 1, 0}"),
    ("Gather of a table by a token's number", "m = ArgMax<axis = 2, keepdims = 0>(x)\n h = Gather(table, m)", "float[8, 8] table"),
    ("GatherND of a table", "m = ArgMax<axis = 2>(x)\n h = GatherND(table, m)", "float[8, 8] table"),
    ("GatherElements of features", "vv, i = TopK<axis = 2>(x, eight)\n h = GatherElements<axis = 2>(x, i)", "int64[1] eight = {8}"),
    ("ScatterElements of features", "vv, i = TopK<axis = 2>(x, two)\n z = Mul(x, half)\n h = ScatterElements<axis = 2>(z, i, vv)", "int64[1] two = {2}"),
    ("OneHot", "m = ArgMax<axis = 2, keepdims = 0>(x)\n h = OneHot(m, eight, offon)", "int64 eight = {8}, float[2] offon = {0.0, 1.0}"),
    ("Tile of features", "t = Tile(x, twice)\n h = MatMul(t, w16)", "int64[3] twice = {1, 1, 2}, float[16, 8] w16"),
    ("Softmax over features", "h = Softmax(x)", ""),
    ("ReduceMean over features", "m = ReduceMean(x, third)\n h = Sub(x, m)", ""),
    ("ReduceMax without keepdims", "m = ReduceMax<keepdims = 0>(x, third)\n u = Unsqueeze(m, third)\n h = Sub(x, u)", ""),
    ("LayerNormalization", "h = LayerNormalization(x, gain, shift)", "float[8] gain, float[8] shift"),
    ("LpNormalization", "h = LpNormalization<axis = 2>(x)", ""),
    ("CumSum over features", "h = CumSum(x, two)", "int64 two = {2}"),
    ("Conv one wide", "cc = Transpose<perm = [0, 2, 1]>(x)\n d = Conv(cc, kernel)\n h = Transpose<perm = [0, 2, 1]>(d)", "float[8, 8, 1] kernel"),
    ("Conv one wide, padded to the size", 'xt = Transpose<perm = [0, 2, 1]>(x)\n y = Conv<auto_pad = "SAME_UPPER">(xt, kernel)\n h = Transpose<perm = [0, 2, 1]>(y)', "float[8, 8, 1] kernel"),
    ("Conv of two tokens, padded before them", 'xt = Transpose<perm = [0, 2, 1]>(x)\n y = Conv<auto_pad = "SAME_LOWER">(xt, kernel)\n h = Transpose<perm = [0, 2, 1]>(y)', "float[8, 8, 2] kernel"),
    ("Conv over features, padded to the size", 'e = Unsqueeze(x, second)\n y = Conv<auto_pad = "SAME_UPPER">(e, kernel)\n h = Squeeze(y, second)', "float[1, 1, 1, 4] kernel"),
    ("Conv over features with strides, padded to a third of the size", 'e = Unsqueeze(x, second)\n y = Conv<auto_pad = "SAME_LOWER", strides = [1, 3]>(e, kernel)\n z = Squeeze(y, second)\n h = MatMul(z, w3)', "float[1, 1, 1, 4] kernel, float[3, 8] w3"),
    ("MaxPool over features, padded to the size", 'e = Unsqueeze(x, second)\n y = MaxPool<auto_pad = "SAME_UPPER", kernel_shape = [1, 3]>(e)\n h = Squeeze(y, second)', ""),
    ("BatchNormalization", "cc = Transpose<perm = [0, 2, 1]>(x)\n d = BatchNormalization(cc, gain, shift, mean, var)\n h = Transpose<perm = [0, 2, 1]>(d)",
     "float[8] gain, float[8] shift, float[8] mean, float[8] var = {1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0}"),
    ("Gemm with a bias", "f = Flatten<axis = 2>(x)\n g = Gemm(f, wq, bias)\n h = Reshape(g, sizes)", "float[8] bias"),
    ("Einsum with weights", 'h = Einsum<equation = "bnd,de->bne">(x, wq)', ""),
    ("ScatterND into features", "t = Transpose<perm = [2, 0, 1]>(x)\n z = Gather<axis = 0>(t, first)\n y = Neg(z)\n s1 = ScatterND(t, place, y)\n h = Transpose<perm = [1, 2, 0]>(s1)",
     "int64[1, 1] place = {3}"),
    ("GatherND of features", "t = Transpose<perm = [2, 0, 1]>(x)\n g = GatherND(t, places)\n h = Transpose<perm = [1, 2, 0]>(g)",
     "int64[8, 1] places = {1, 0, 3, 2, 5, 4, 7, 6}"),
    ("GroupNormalization is one of tokens where they are the batch", "f = Flatten<axis = 2>(x)\n g = InstanceNormalization(u, gain, shift)\n u = Unsqueeze(f, second)\n q5 = Squeeze(g, second)\n h = Reshape(q5, sizes)",
     "float[1] gain, float[1] shift"),
    ("an Einstein sum of one", 'h0 = Einsum<equation = "bnd->dnb">(x)\n h = Einsum<equation = "dnb -> bnd">(h0)', ""),
    ("an Einstein sum of two whose result is not said", 'h0 = Einsum<equation = "and,dz">(x, wq)\n h = Identity(h0)', ""),
    ("an Einstein sum of three", 'h = Einsum<equation = "bnd, de, ef -> bnf">(x, wq, wk)', ""),
    ("an Einstein sum of four whose result is not said", 'h0 = Einsum<equation = "zyd,de,ef,fg">(x, wq, wk, wv)\n h = Transpose<perm = [2, 1, 0]>(h0)', ""),
    ("two tensors of tokens in an Einstein sum", 'y = MatMul(x, wq)\n h = Einsum<equation = "bnd,bnd->bnd">(x, y)', ""),
    ("MatMulInteger", "u, s1, z1 = DynamicQuantizeLinear(nil8)\n nil8 = Identity(w8f)\n i = Cast<to = 3>(xr)\n xr = Round(x)\n m = MatMulInteger(i, w8)\n h = Cast<to = 1>(m)",
     "int8[8, 8] w8, float[8, 8] w8f"),
    ("Where by a token's sign", "p = Greater(x, nil)\n y = Neg(x)\n h = Where(p, x, y)", "float nil = {0.0}"),
    ("FusedMatMul", "h = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(x, wq)", ""),
    ("QuantizeLinear and QLinearMatMul", "u = QuantizeLinear(x, s1, z1)\n i = QLinearMatMul(u, s1, z1, w8, s1, z1, s2, z1)\n h = DequantizeLinear(i, s2, z1)",
     "float s1 = {0.03}, uint8 z1 = {128}, float s2 = {0.3}, uint8[8, 8] w8"),
    ("CastLike", "f = Cast<to = 10>(x)\n h = CastLike(f, half)", ""),
    ("positions added", "p = Cast<to = 1>(column)\n h = Add(x, p)", ""),
    ("positions looked up", "p = Gather(table, at)\n h = Add(x, p)", "float[2000, 8] table"),
    ("positions in the table's second axis", "p = Gather<axis = 1>(table, at)\n t = Transpose(p)\n h = Add(x, t)", "float[8, 2000] table"),
]  # fmt: skip


@pytest.mark.parametrize(("hidden", "constants"), [pytest.param(*case[1:], id=case[0]) for case in ON_TOKENS])
def test_tokens_stay_apart(hidden, constants):
    assert_law_of(attention(hidden=hidden, constants=constants))


def test_batch_normalization_in_training_mode_is_refused():
    normalized = "cc = Transpose<perm = [0, 2, 1]>(x)\n d, m2, v2 = BatchNormalization<training_mode = 1>"
    normalized += "(cc, gain, shift, mean, var)\n h = Transpose<perm = [0, 2, 1]>(d)"
    constants = "float[8] gain, float[8] shift, float[8] mean, float[8] var"
    with pytest.raises(UnsupportedError, match="training mode"):
        injected(in_order(read(attention(hidden=normalized, constants=constants))))


DROPOUT = "h = Dropout<seed = 1>(x, rate, training)"


@pytest.mark.parametrize(("rate", "training"), [(0.5, 0), (0.0, 1)])
def test_dropout_that_drops_nothing(rate, training):
    assert_law_of(attention(hidden=DROPOUT, constants=f"float rate = {{{rate}}}, bool training = {{{training}}}"))


PLACES = "f = Cast<to = 1>(column)\n"
RANDOM = [
    ("Dropout in training mode", DROPOUT, {"constants": "bool training = {1}, float rate = {0.5}"}),
    ("Dropout in a mode that is given", DROPOUT, {"constants": "float rate = {0.5}", "inputs": "bool training"}),
    ("Dropout of positions", f"{PLACES} r = Dropout(f, half, training)\n h = Add(x, r)", {"constants": "bool training = {1}"}),
    ("noise of tokens", "r = RandomUniformLike<low = 0.5, high = 0.500001>(x)\n h = Add(x, r)", {}),
    ("noise for all tokens", "r = RandomNormal<shape = [1, 1, 8]>()\n h = Add(x, r)", {}),
    ("noise of positions", f"{PLACES} r = RandomUniformLike(f)\n h = Add(x, r)", {}),
]  # fmt: skip


@pytest.mark.parametrize(("hidden", "given"), [pytest.param(*case[1:], id=case[0]) for case in RANDOM])
def test_random_numbers_are_refused(hidden, given):
    with pytest.raises(UnsupportedError, match="draws random numbers"):
        injected(in_order(read(attention(hidden=hidden, **given))))


def test_a_random_mask_is_refused():
    """Numbers that nearly always are the same would pass all runs of the proof."""
    allowed = "f = Cast<to = 1>(row)\n r = RandomUniformLike(f)\n rare = Greater(r, most)\n"
    allowed += "early = LessOrEqual(row, column)\n allowed = Or(early, rare)"
    with pytest.raises(UnsupportedError, match="draws random numbers"):
        injected(in_order(read(attention(allowed=allowed, constants="float most = {0.999999}"))))


# From row [1, n] and column [n, 1] to allowed [n, n].
N1 = "n1 = Unsqueeze(length, first)\n nn = Concat<axis = 0>(n1, n1)\n"
CONTEXT = [
    ("Trilu of ones", f"{N1} o = Expand(one, nn)\n t = Trilu<upper = 0>(o)\n allowed = Cast<to = 9>(t)", ""),
    ("Trilu above the diagonal", f"{N1} o = Expand(one, nn)\n t = Trilu<upper = 1>(o, one)\n allowed = Equal(t, nought)", ""),
    ("ConstantOfShape", f"{N1} o = ConstantOfShape<value = float[1] {{1.0}}>(nn)\n t = Trilu<upper = 0>(o)\n allowed = Cast<to = 9>(t)", ""),
    ("CumSum along keys and queries", f"{N1} o = Expand(one, nn)\n r = CumSum(o, one)\n cc = CumSum(o, nought)\n allowed = LessOrEqual(r, cc)", ""),
    ("a flat range, reshaped", f"{N1} all = Mul(length, length)\n f = Range(nought, all, one)\n g = Reshape(f, nn)\n kk = Mod(g, length)\n qq = Div(g, length)\n allowed = LessOrEqual(kk, qq)", ""),
    ("Tile of a row", f"{N1} times = Concat<axis = 0>(n1, second)\n t = Tile(row, times)\n allowed = LessOrEqual(t, column)", ""),
    ("Transpose", "allowed = LessOrEqual(row, down)\n down = Transpose<perm = [1, 0]>(row)", ""),
    ("Concat of two halves", "a = LessOrEqual(row, column)\n u = Unsqueeze(a, first)\n cc = Concat<axis = 0>(u, u)\n i = Cast<to = 7>(cc)\n m = ReduceMin<keepdims = 0>(i, first)\n allowed = Cast<to = 9>(m)", ""),
    ("GatherND of a table", f"{N1} i = Unsqueeze(at, second)\n places = GatherND(numbers, i)\n kk = Unsqueeze(places, first)\n allowed = LessOrEqual(kk, column)",
     f"int64[1100] numbers = {{{', '.join(map(str, range(1100)))}}}"),
    ("Gather of rows of a mask", f"{N1} o = Expand(one, nn)\n t = Trilu<upper = 0>(o)\n r = Gather(t, at)\n allowed = Cast<to = 9>(r)", ""),
    ("a product of places", "r = Cast<to = 1>(row)\n cc = Cast<to = 1>(column)\n p = MatMul(cc, half1)\n h1 = Mul(r, half)\n allowed = LessOrEqual(h1, p)", "float[1, 1] half1 = {0.5}"),
    ("an Einstein sum of places", 'r = Cast<to = 1>(at)\n o = ConstantOfShape<value = float[1] {1.0}>(n1)\n n1 = Unsqueeze(length, first)\n cc = Einsum<equation = "i,j->ij">(r, o)\n kk = Cast<to = 1>(row)\n allowed = LessOrEqual(kk, cc)', ""),
    ("Squeeze", "a = LessOrEqual(row, column)\n u = Unsqueeze(a, first)\n allowed = Squeeze(u, first)", ""),
    ("Slice of a longer range", "m = Add(length, one)\n r = Range(nought, m, one)\n n1 = Unsqueeze(m, first)\n s2 = Slice(r, second, n1, first)\n kk = Sub(s2, one)\n u = Unsqueeze(kk, first)\n allowed = LessOrEqual(u, column)", ""),
    ("places of 32 bits", "i = Cast<to = 6>(length)\n z = Cast<to = 6>(nought)\n o = Cast<to = 6>(one)\n r = Range(z, i, o)\n u = Unsqueeze(r, first)\n w3 = Unsqueeze(r, second)\n allowed = LessOrEqual(u, w3)", ""),
    ("the smaller of length and a bound", "m = Min(length, many)\n r = Range(nought, m, one)\n u = Unsqueeze(r, first)\n d = LessOrEqual(u, column)\n allowed = And(d, d)", "int64 many = {1048576}"),
    ("a size as a product of the shape", "p = ReduceProd<keepdims = 0>(n2)\n n2 = Slice(sizes, second, third)\n r = Range(nought, p, one)\n u = Unsqueeze(r, first)\n allowed = LessOrEqual(u, column)", ""),
    ("Identity and Cast", "i = Identity(row)\n f = Cast<to = 1>(i)\n cc = CastLike(column, f)\n allowed = LessOrEqual(f, cc)", ""),
]  # fmt: skip


@pytest.mark.parametrize(("allowed", "constants"), [pytest.param(*case[1:], id=case[0]) for case in CONTEXT])
def test_context_in_any_form(allowed, constants):
    assert_law_of(attention(allowed=allowed, constants=constants))


@pytest.mark.parametrize("along", ["one", "nought"], ids=["of keys", "of queries"])
def test_a_mask_from_eye_like(along):
    reverse = 1 if along == "one" else 0
    assert_law_of(
        attention(
            allowed=f"{N1} o = ConstantOfShape(nn)\n e = EyeLike(o)\n t = CumSum<reverse = {reverse}>(e, {along})\n"
            "allowed = Cast<to = 9>(t)"
        )
    )


def test_a_mask_from_eye_like_next_to_the_diagonal():
    # key j + 1 for query j, summed along queries: all keys before the query; its own is allowed by the other
    assert_law_of(
        attention(
            allowed=f"{N1} o = ConstantOfShape(nn)\n e = EyeLike<k = -1>(o)\n f = EyeLike(o)\n g = Add(e, f)\n"
            "t = CumSum(g, nought)\n allowed = Cast<to = 9>(t)"
        )
    )


def test_keys_that_are_sorted():
    # how far a score is from the mean of all that are allowed, by sorting and by summing up
    text = attention(
        masked="m1 = Where(allowed, s, low)\n n1 = Unsqueeze(length, first)\n z, i = TopK<axis = -1>(m1, n1)\n"
        "top = Slice(z, first, second, third)\n masked_scores = Sub(m1, top)"
    )
    with pytest.raises(UnsupportedError):
        injected(read(text))
    assert_law_of(text.replace("top = Slice(z, first, second, third)", "e9 = Sigmoid(z)\n c9 = CumSum(e9, two)\n top = ReduceMax(c9, third)")
                  .replace("int64[1] first", "int64 two = {2}, int64[1] first"))  # fmt: skip


@pytest.mark.parametrize(
    "picked",
    ["l2 = Min(length, two)\n n1 = Unsqueeze(l2, first)\n z, i = TopK<axis = -1>(s, n1)\n top = ReduceMin(z, third)\n s2 = Sub(s, top)",
     "n1 = Unsqueeze(length, first)\n z, i = TopK<axis = -1>(s, n1)\n s2 = ScatterElements<axis = 2>(s, i, z)"],
    ids=["some of them", "put back in another order"],
)  # fmt: skip
def test_keys_that_are_picked_are_refused(picked):
    text = attention(masked=f"{picked}\n masked_scores = Where(allowed, s2, low)", constants="int64 two = {2}")
    with pytest.raises(UnsupportedError):
        injected(read(text))


TRIANGLES = [
    ("lower", "t = Trilu<upper = 0>(s)"),
    ("upper of what is turned", "d = Transpose<perm = [0, 2, 1]>(s)\n u = Trilu(d)\n t = Transpose<perm = [0, 2, 1]>(u)"),
    ("below the diagonal and it", "a = Trilu<upper = 0>(s, minus)\n e = Sub(s, a)\n d = Trilu<upper = 0>(e)\n t = Add(a, d)"),
]  # fmt: skip


@pytest.mark.parametrize("triangle", [pytest.param(lines, id=title) for title, lines in TRIANGLES])
def test_weights_without_softmax_are_cut_to_a_triangle(triangle):
    text = attention(scores=f"s = Relu(s0)\n {triangle}", allowed="", masked="", constants="int64 minus = {-1}")
    assert_law_of(text.replace("w = Softmax<axis = -1>(masked_scores)", "w = Identity(t)"))


@pytest.mark.parametrize("triangle", ["t = Trilu<upper = 0>(s, one)", "t = Trilu(s)"], ids=["one too far", "the other"])
def test_other_triangles_see_ahead(triangle):
    text = attention(scores=f"s = Relu(s0)\n {triangle}", allowed="", masked="")
    with pytest.raises(UnsupportedError, match="attention is not causal"):
        injected(read(text.replace("w = Softmax<axis = -1>(masked_scores)", "w = Identity(t)")))


ROTARY = """case (float[b, n, 8] x) => (float[b, n, 8] logits)
<float[8, 8] wk, float[1200, 2] cosines, float[1200, 2] sines, int64 nought = {0}, int64 one = {1}, int64[1] first = {0}>
{
  sizes = Shape(x)
  length = Gather(sizes, one)
  at = Range(nought, length, one)
  r = Unsqueeze(at, first)
  bs = Slice(sizes, first, two)
  two = Constant<value_ints = [2]>()
  positions = Expand(r, bs)
  k0 = MatMul(x, wk)
  k = RotaryEmbedding<num_heads = 2>(k0, cosines, sines, positions)
  logits = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(x, k, k)
}"""


def test_rotary_embedding_of_opset_23():
    assert_law_of(ROTARY, 23)


FUSED = """case (float[b, n, 8] x, int64[b, n] attention_mask) => (float[b, n, 8] logits)
<float[8, 8] wk, int64 nought = {0}, int64[2] keys = {1, 2}, float zero = {0.0}, float low = {-10000.0}>
{
  k = MatMul(x, wk)
  kept = Greater(attention_mask, nought)
  wide = Unsqueeze(kept, keys)
  MASK
  logits = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(x, k, k, mask)
}"""


@pytest.mark.parametrize("mask", ["mask = Identity(wide)", "mask = Where(wide, zero, low)"], ids=["bool", "float"])
def test_a_fused_attention_that_is_causal_and_has_a_mask(mask):
    assert_law_of(FUSED.replace("MASK", "sizes = Shape(x)\n b_n = Slice(sizes, nil1, two1)\n nil1 = Constant<value_ints = [0]>()\n"
                                "two1 = Constant<value_ints = [2]>()\n" + mask.replace("wide", "spread") +
                                "\n n1 = Slice(sizes, one1, two1)\n one1 = Constant<value_ints = [1]>()\n"
                                "target = Concat<axis = 0>(one1, one1, n1, one1)\n spread = Expand(wide, target)"), 23)  # fmt: skip


LAST = {
    "Gather": "g = Gather<axis = 1>(c, minus)\n logits = Unsqueeze(g, second)",
    "Gather from the front": "g = Gather<axis = 1>(c, before)\n logits = Unsqueeze(g, second)",
    "Slice": "logits = Slice(c, minus1, end, second)",
    "Slice from the front": "l1 = Unsqueeze(before, first)\n e1 = Unsqueeze(length, first)\n logits = Slice(c, l1, e1, second)",
    "Slice from the front to the end": "l1 = Unsqueeze(before, first)\n logits = Slice(c, l1, end, second)",
}


def taking(last: str) -> str:
    constants = "int64 minus = {-1}, int64[1] minus1 = {-1}, int64[1] end = {9223372036854775807}"
    text = attention(after=f"{last}\n before = Sub(length, one)", constants=constants)
    return text.replace("(float[b, n, 8] logits)", "(float[b, 1, 8] logits)")


@pytest.mark.parametrize("last", LAST.values(), ids=LAST.keys())
def test_the_last_token_is_the_last_of_all(last):
    assert_law_of(taking(last))


def test_the_token_before_the_last_is_in_no_call_of_one_token():
    last = "two = Sub(before, one)\n g = Gather<axis = 1>(c, two)\n logits = Unsqueeze(g, second)"
    with pytest.raises(UnsupportedError, match="by their position"):
        injected(in_order(read(taking(last), 18)))


@pytest.mark.parametrize(
    "parts",
    ["SplitToSequence<axis = 2>(x, sizes_of)", "SplitToSequence<axis = 2>(x, size_of)",
     "SequenceConstruct(x9, z9)\n x9, z9 = Split<axis = 2, num_outputs = 2>(x)"],
    ids=["of sizes", "of one size", "constructed"],
)  # fmt: skip
@pytest.mark.parametrize("places", [("nought", "one"), ("one", "nought")])
def test_sequences_are_taken_apart(parts, places):
    assert_law_of(attention(
        hidden=f"parts = {parts}\n a = SequenceAt(parts, {places[0]})\n z = SequenceAt(parts, {places[1]})\n"
        "h = Concat<axis = 2>(z, a)", constants="int64[2] sizes_of = {4, 4}, int64 size_of = {4}"))  # fmt: skip


def test_sequences_are_taken_apart_at_their_end():
    # the last part of 8 features by threes is what is left
    text = attention(
        hidden="parts = SplitToSequence<axis = 2>(x, three)\n a = SequenceAt(parts, two)\n z = SequenceAt(parts, nought)\n"
        "aa = SequenceConstruct(z, x, a)\n h0 = ConcatFromSequence<axis = 2>(aa)\n h = MatMul(h0, narrow)",
        constants="int64 three = {3}, int64 two = {2}, float[13, 8] narrow",
    )
    assert_law_of(text)


@pytest.mark.parametrize(
    ("keepdims", "joined"), [(1, "Concat<axis = 2>(z, x)"), (0, "Concat<axis = 2>(z1, x)\n z1 = Unsqueeze(z, third)")]
)
def test_sequences_of_single_features_are_taken_apart(keepdims, joined):
    text = attention(
        hidden=f"parts = SplitToSequence<axis = 2, keepdims = {keepdims}>(x)\n z = SequenceAt(parts, three)\n h0 = {joined}\n"
        "h = MatMul(h0, narrow)",
        constants="int64 three = {3}, float[9, 8] narrow",
    )
    assert_law_of(text)


def test_a_mask_of_queries_against_keys_that_the_caller_makes():
    text = attention(
        inputs="float[b, n, n] bias", masked="masked_scores = Add(s, bias)", allowed="allowed = Identity(one)"
    )
    original = read(text)
    whole = {
        "x": np.random.default_rng(0).standard_normal((2, 9, 8)).astype(np.float32),
        "bias": np.repeat(np.triu(np.full((1, 9, 9), -1e4, np.float32), 1), 2, axis=0),
    }
    assert_law(original, injected(original), whole)


@pytest.mark.parametrize(
    ("hidden", "constants", "reason"),
    [("cc = Transpose<perm = [0, 2, 1]>(x)\n p = GlobalAveragePool(cc)\n t = Transpose<perm = [0, 2, 1]>(p)\n h = Sub(x, t)", "", "GlobalAveragePool mixes"),
     ("cc = Transpose<perm = [0, 2, 1]>(x)\n d = Conv<strides = [2]>(cc, kernel)\n h = Transpose<perm = [0, 2, 1]>(d)", "float[8, 8, 1] kernel", "Conv mixes"),
     ('xt = Transpose<perm = [0, 2, 1]>(x)\n y = Conv<auto_pad = "SAME_UPPER", strides = [2]>(xt, kernel)\n h = Transpose<perm = [0, 2, 1]>(y)', "float[8, 8, 1] kernel", "Conv mixes"),
     ('xt = Transpose<perm = [0, 2, 1]>(x)\n y = Conv<auto_pad = "SAME_UPPER">(xt, kernel)\n h = Transpose<perm = [0, 2, 1]>(y)', "float[8, 8, 2] kernel", "Conv mixes"),
     ("t = Transpose<perm = [0, 2, 1]>(x)\n g = MatMul(t, x)\n h = MatMul(x, g)", "", "MatMul mixes"),
     ("f = Flatten<axis = 1>(x)\n s1 = Softmax(f)\n h = Reshape(s1, sizes)", "", "Softmax mixes"),
     ("h = Slice(x, first, end, second, two)", "int64[1] end = {9223372036854775807}, int64[1] two = {2}", "by their position"),
     ("h = Slice(x, first, first, sizes)", "", "bounds along the sequence are unknown"),
     ("p = Reshape(x, halves)\n h = Reshape(p, sizes)", "int64[3] halves = {0, -1, 16}", None)],
    ids=["GlobalAveragePool", "Conv with strides", "padded Conv with strides", "Conv of a token and the next", "a Gram matrix", "Softmax over all",
         "every second token", "axes that depend on the length", "tokens in pairs"],
)  # fmt: skip
def test_what_does_not_keep_them_apart_is_refused(hidden, constants, reason):
    with pytest.raises(UnsupportedError) as refusal:
        Subject.of(read(attention(hidden=hidden, constants=constants))).decoder()
    assert reason is None or reason in str(refusal.value)
    assert refusal.value.at


def test_relative_positions_brought_by_context():
    # [n, n, 8] of relative positions, met by queries: q . r, as Shaw and T5 have it
    text = attention(
        constants="float[2000, 8] table, int64 middle = {1000}, int64[1] heads = {1}",
        scores="d = Sub(column, row)\n m = Add(d, middle)\n r = Gather(table, m)\n"
        'z = Einsum<equation = "bqd,qkd->bqk">(q, r)\n s = Add(s0, z)',
    )
    assert_law_of(text)


@pytest.mark.parametrize("axis", [1, 2])
def test_scores_met_element_by_element(axis):
    # queries and keys side by side, multiplied and summed over features
    text = (
        attention()
        .replace(
            "s0 = MatMul(q, kt)",
            "q4 = Unsqueeze(q, third)\n k4 = Unsqueeze(k, second)\n p4 = Mul(q4, k4)\n s0 = ReduceSum<keepdims = 0>(p4, last)",
        )
        .replace("int64[1] first", "int64[1] last = {3}, int64[1] first")
    )
    assert_law_of(text if axis == 1 else text.replace("Mul(q4, k4)", "Mul(k4, q4)"))


def test_a_target_that_copies_keys_into_the_place_of_queries():
    scores = "s1 = Reshape(s0, apart) s2 = Mul(s1, half) s = Squeeze(s2, second)"

    assert_law_of(attention(scores=scores, constants="int64[4] apart = {0, 1, 0, -1}"))
