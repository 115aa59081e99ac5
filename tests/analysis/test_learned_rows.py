"""Learned rows next to the tokens: learned keys and values, or a key of zeros."""

import numpy as np
import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from written import read

import kvsurgeon
from kvsurgeon.errors import Code, UnsupportedError

CONSTANTS = "float[1, 3, 8] mk, float[1, 3, 8] mv, int64 three = {3}, int64[1] eight = {8}, int64[1] rows = {3}"
CONSTANTS += ", int64[6] pads = {0, 3, 0, 0, 0, 0}, int64[6] one_pad = {0, 0, 0, 0, 1, 0}"
TO = "bn = Slice(sizes, first, second)\n to = Concat<axis = 0>(bn, rows, eight)\n mks = Expand(mk, to)\n"
VALUES = "mvs = Expand(mv, to)\n"
BEFORE = {"key": f"{TO} k = Concat<axis = 1>(mks, k0)", "value": f"{VALUES} v = Concat<axis = 1>(mvs, v0)"}
BEHIND = {"key": f"{TO} k = Concat<axis = 1>(k0, mks)", "value": f"{VALUES} v = Concat<axis = 1>(v0, mvs)"}
ZEROS = {"key": "k = Pad(k0, pads)", "value": "v = Pad(v0, pads)"}
AND_ZERO = {"key": f"{TO} k1 = Concat<axis = 1>(mks, k0)\n k = Pad(k1, one_pad)",
            "value": f"{VALUES} v1 = Concat<axis = 1>(mvs, v0)\n v = Pad(v1, one_pad)"}  # fmt: skip
WIDE = "far = Add(length, three)\n wide = Range(nought, far, one)\n places = Unsqueeze(wide, first)\n"
FRONT = f"{WIDE} token = Sub(places, three)\n allowed = LessOrEqual(token, column)"
BACK = f"{WIDE} token = LessOrEqual(places, column)\n own = GreaterOrEqual(places, length)\n allowed = Or(token, own)"
ENDS = f"""{WIDE} token = Sub(places, three)
 visible = LessOrEqual(token, column)
 shape = Shape(column)
 wall = ConstantOfShape<value = bool[1] {{1}}>(shape)
 allowed = Concat<axis = 1>(visible, wall)"""


def text(ends: dict[str, str], allowed: str, **parts: str) -> str:
    return attention(**{"constants": CONSTANTS, "allowed": allowed, **ends, **parts})


@pytest.mark.parametrize(
    ("ends", "allowed"), [(BEFORE, FRONT), (BEHIND, BACK), (ZEROS, FRONT), (AND_ZERO, ENDS)],
    ids=["before", "behind", "zeros", "both"],
)  # fmt: skip
def test_they_are_no_part_of_the_cache(ends, allowed):
    assert_law_of(text(ends, allowed))


def test_inspect_reports_them():
    (layer,) = kvsurgeon.inspect(in_order(read(text(BEFORE, FRONT)))).attentions
    assert (layer.query_heads, layer.kv_heads, layer.head_dim) == (1, 1, 8)


def test_they_are_cut_off_the_weights_again():
    only_keys = {"key": BEFORE["key"], "after": "logits = Identity(c)"}
    changed = text(only_keys, FRONT).replace("c = MatMul(w, v)", "wt = Slice(w, rows, far1, third)\n c = MatMul(wt, v)")
    assert_law_of(changed.replace("far = Add", "far1 = Unsqueeze(far, first)\n far = Add"))


# torch.cat([torch.zeros_like(scores[..., :1]), scores], -1).softmax(-1)[..., 1:]
QUIET = """part = Slice(masked_scores, first, second, third)
 part_sizes = Shape(part)
 zeros = ConstantOfShape(part_sizes)
 wide = Concat<axis = 2>(zeros, masked_scores)
 shares = Softmax<axis = -1>(wide)
 w = Slice(shares, second, far, third)"""


def test_a_column_of_the_shape_of_one_key_is_added():
    plain = attention(constants=f"{CONSTANTS}, int64[1] far = {{99999999999}}")
    assert_law_of(plain.replace("w = Softmax<axis = -1>(masked_scores)", QUIET))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({**BEFORE, "allowed": FRONT.replace("token, column", "token, one_more").replace(
            "token = ", "one_more = Add(column, one)\n token = ")}, "attention is not causal"),
        ({**BEFORE, "allowed": FRONT, "scores": "n = Cast<to = 1>(length)\n t = Div(s0, n)\n s = Mul(t, n)"
          .replace("Mul(t, n)", "Identity(t)")}, "depend on the total length"),
        ({"key": BEFORE["key"], "allowed": FRONT, "value": "v = Concat<axis = 1>(v0, mvs)\n" + VALUES}, "mixes tokens"),
        ({"key": "vm = ReduceMean<keepdims = 1>(k0, second)\n k = Concat<axis = 1>(vm, k0)",
          "value": "v = Pad(v0, one_pad)", "allowed": BACK}, "mixes tokens"),
    ],
    ids=["mask that looks rows_before", "scores over the length", "values at another end", "rows made of tokens"],
)  # fmt: skip
def test_what_a_cache_does_not_support_is_rejected(parts, reason):
    with pytest.raises(UnsupportedError, match=reason):
        injected(in_order(read(text({}, **parts))))


# Weights without softmax: the weight of learned rows depends on how many tokens follow.
SCALED = """is_own = Less(token, nought)
 n = Cast<to = 1>(length)
 factor = Where(is_own, n, half)
 s1 = Mul(s0, factor)
 s = Relu(s1)"""


def test_what_they_are_given_must_not_depend_on_what_follows():
    constants = CONSTANTS + ", float nothing = {0.0}"
    parts = {"scores": SCALED, "masked": "masked_scores = Where(allowed, s, nothing)", "constants": constants}
    changed = text(BEFORE, FRONT, **parts).replace("w = Softmax<axis = -1>", "w = Identity")
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        injected(in_order(read(changed)))


def test_positions_of_keys_with_learned_rows_must_not_count_from_the_end():
    transposed = (
        f"{TO} k1 = Concat<axis = 1>(mks, k0)\n fs = Cast<to = 1>(token)\n n = Cast<to = 1>(length)\n g = Sub(fs, n)"
    )
    transposed += "\n gt = Transpose<perm = [1, 0]>(g)\n k = Add(k1, gt)"
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        injected(in_order(read(text({**BEFORE, "key": transposed}, FRONT))))


def test_queries_cannot_have_them():
    with pytest.raises(UnsupportedError):
        injected(
            in_order(read(text({"query": f"{TO} q = Concat<axis = 1>(mks, q0)"}, "allowed = LessOrEqual(row, column)")))
        )


def test_a_past_of_fixed_length_is_no_learned_row():
    past = {"key": "k = Concat<axis = 1>(past_key, k0)", "value": "v = Concat<axis = 1>(past_value, v0)"}
    inputs = "float[b, 3, 8] past_key, float[b, 3, 8] past_value"
    with pytest.raises(UnsupportedError, match="already has a cache"):
        injected(in_order(read(text(past, FRONT, inputs=inputs))))


def test_keys_that_are_joined_to_themselves_are_no_past():
    with pytest.raises(UnsupportedError, match="Concat mixes tokens along the sequence") as error:
        injected(in_order(read(text({"key": "k = Concat<axis = 1>(k0, k0)"}, FRONT))))
    assert error.value.code is not Code.HAS_CACHE


# Sums over keys of context: values that depend on the distance.
DISTANCES = """d = Sub(column, row)
 m = Add(d, middle)
 r = Gather(table, m)
 e = Einsum<equation = "bqk,qkd->bqd">(w, r)
 logits = Add(c, e)"""
TABLE = "float[2000, 8] table, int64 middle = {1000}"


def test_keys_are_summed_against_values_of_their_distance():
    assert_law_of(attention(after=DISTANCES, constants=TABLE))


@pytest.mark.parametrize(
    ("after", "reason"),
    [(DISTANCES.replace("(w, r)", "(s0, r)"), "depend on the total length"),
     (DISTANCES.replace("d = Sub(column, row)", "d = Sub(length, row)"), "depend on the total length")],
    ids=["scores that are not masked", "places from the end"],
)  # fmt: skip
def test_only_weights_may_be_summed_so(after, reason):
    with pytest.raises(UnsupportedError, match=reason):
        injected(in_order(read(attention(after=after, constants=TABLE))))


def test_synthetic_learned_rows_do_not_depend_on_the_length():
    from kvsurgeon.analysis.probe_inputs import synthetic_values
    from kvsurgeon.symbolic.sequence_axes import Length, LengthVariable, SequenceAxis

    axes = (SequenceAxis(0, LengthVariable(Length.TOTAL), rows_before=2, rows_after=1),)
    short, long = (synthetic_values((length + 3,), axes, np.arange(length), None) for length in (7, 40))
    np.testing.assert_array_equal(short[:9], long[:9])
    assert short[-1] == long[-1]


FUSED = """case (float[b, n, 8] x) => (float[b, n, 8] logits)
<float[8, 8] wq, float[8, 8] wk, float[8, 8] wv, float[1, 2, 3, 4] mk, float[1, 2, 3, 4] mv,
 int64[4] apart = {0, 0, 2, 4},
 int64[3] together = {0, 0, 8}, int64[3] shape = {2, 3, 4}, int64 nought = {0}, int64 one = {1}, int64 three = {3},
 int64[1] first = {0}, int64[1] second = {1}>
{
  sizes = Shape(x)
  length = Gather(sizes, one)
  at = Range(nought, length, one)
  column = Unsqueeze(at, second)
  far = Add(length, three)
  wide = Range(nought, far, one)
  token = Sub(wide, three)
  allowed = LessOrEqual(token, column)
  qp = MatMul(x, wq)
  kp = MatMul(x, wk)
  vp = MatMul(x, wv)
  q1 = Reshape(qp, apart)
  k1 = Reshape(kp, apart)
  v1 = Reshape(vp, apart)
  q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = Transpose<perm = [0, 2, 1, 3]>(k1)
  v0 = Transpose<perm = [0, 2, 1, 3]>(v1)
  texts = Slice(sizes, first, second)
  to = Concat<axis = 0>(texts, shape)
  mks = Expand(mk, to)
  mvs = Expand(mv, to)
  k = Concat<axis = 2>(mks, k0)
  v = Concat<axis = -2>(mvs, v0)
  c = Attention(q, k, v, allowed)
  c1 = Transpose<perm = [0, 2, 1, 3]>(c)
  logits = Reshape(c1, together)
}"""


def test_an_operator_for_the_whole_attention_may_have_them():
    assert_law_of(FUSED, opset=23)


def test_rows_that_are_queries_too_are_rejected_with_this_reason():
    wide = f"{WIDE} below = Unsqueeze(wide, second)\n allowed = LessOrEqual(places, below)"
    memory = attention(
        hidden=f"{TO} h = Concat<axis = 1>(mks, x)", allowed=wide,
        constants=CONSTANTS, after="logits = Identity(c)",
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="are queries too"):
        injected(in_order(read(memory)))


def test_chunks_that_attend_to_themselves_are_named_as_such():
    padded = read("""decoder (int64[1, 6] input_ids) => (float[1, 6, 11] logits)
<float[11, 4] embeddings, float[4, 11] wo, int64[6] pads = {0, 0, 0, 0, 2, 0}, int64[1] nought = {0},
 int64[1] end = {6}, int64[1] second = {1}, float[8, 8] seen>
{
 x = Gather(embeddings, input_ids) p = Pad(x, pads) t = Transpose<perm = [0, 2, 1]>(p) s = MatMul(p, t)
 m = Mul(s, seen) c = MatMul(m, p) y = Slice(c, nought, end, second) logits = MatMul(y, wo)
}""")
    with pytest.raises(UnsupportedError, match="padded to whole chunks"):
        injected(padded)
