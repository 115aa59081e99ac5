"""What must be refused because of what the context computes, and where each refusal points."""

# ruff: noqa: E501  # a case is read best on one line

import pytest
from attentions import assert_law_of, attention
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject

# cos and sin of positions, times frequencies that some numbers change: `{frequencies}` makes `f [8]`
TURNED = """place = Cast<to = 1>(column)
  {frequencies}
  angle = Mul(place, f)
  wave = Cos(angle)
  k = Mul(k0, wave)"""
LENGTH_AS_FLOAT = "long = Cast<to = 1>(length)"
WEIGHTS = "float[8] base = {1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01}, float[8] other"

REFUSED = [
    ("no mask", attention(masked="masked_scores = Identity(s)"), "attention is not causal", "c"),
    ("a mask the other way round", attention(allowed="allowed = GreaterOrEqual(row, column)"), "attention is not causal", "c"),
    ("a window that looks ahead by one",
     attention(allowed="d = Sub(row, column)\n allowed = LessOrEqual(d, one)"), "attention is not causal", "c"),
    ("a prefix that sees itself whole",
     attention(allowed="early = Less(row, four)\n late = LessOrEqual(row, column)\n allowed = Or(early, late)",
               constants="int64 four = {4}"), "attention is not causal", "c"),
    ("a bias too small to hide", attention(constants="float little = {2.0}",
     masked="hidden = Sub(s, little)\n masked_scores = Where(allowed, s, hidden)"), "attention is not causal", "c"),
    ("keys counted from the end", attention(allowed="end = Sub(length, one)\n back = Sub(end, row)\n"
     "causal = LessOrEqual(row, column)\n late = Less(back, three)\n own = Equal(row, column)\n near = Or(late, own)\n allowed = And(causal, near)",
     constants="int64 three = {3}"), "depend on the total length", "c"),
    ("frequencies by length (dynamic NTK)", attention(constants=WEIGHTS, key=TURNED.format(
        frequencies=f"{LENGTH_AS_FLOAT}\n f = Div(base, long)")), "depend on the total length", "wave"),
    ("frequencies that switch at few tokens (LongRoPE)", attention(constants=f"{WEIGHTS}, int64 sixteen = {{16}}",
     key=TURNED.format(frequencies="far = Greater(length, sixteen)\n f = Where(far, other, base)")),
     "depend on the total length", "wave"),
    ("no row at all to see", attention(constants="float inf = {1.0}, float zero = {0.0}",
     masked="never = Div(inf, zero)\n least = Neg(never)\n bias = Where(allowed, least, least)\n"
     "masked_scores = Add(s, bias)"), "attention weights are NaN", "c"),
    ("a custom mask", attention(allowed="allowed = somebodys.Mask(row, column)",
     constants="bool[n, n] allowed"), "cannot run the context", None),
    ("two axes that nobody sums", attention().replace("c = MatMul(w, v)", "c = ReduceMax(w, third)"),
     "two sequence axes meet, but neither is summed", "s0"),
    ("softmax over tokens outside attention", attention(hidden="h = Softmax<axis = 1>(x)"), "Softmax mixes tokens", "h"),
    ("the largest over tokens", attention(hidden="m = ReduceMax(x, second)\n h = Sub(x, m)"), "ReduceMax mixes", "m"),
    ("the best of tokens", attention(hidden="m = ArgMax<axis = 1>(x)\n f = Cast<to = 1>(m)\n h = Sub(x, f)"),
     "ArgMax mixes", "m"),
    ("tokens sorted", attention(hidden="h, i = TopK<axis = 1>(x, third)"), "TopK mixes", "h"),
    ("a norm along tokens", attention(hidden="h = LpNormalization<axis = 1>(x)"), "LpNormalization mixes", "h"),
    ("tokens split", attention(hidden="a, z = Split<axis = 1, num_outputs = 2>(x)\n h = Concat<axis = 1>(z, a)"),
     "Split mixes", "a"),
    ("queries added to keys", attention(scores="t = Transpose<perm = [0, 2, 1]>(s0)\n s = Add(s0, t)"),
     "queries and keys cannot be told apart", None),
    ("tokens tell where to look", attention(hidden="m = ReduceMax<keepdims = 0>(x, third)\n i = Cast<to = 7>(m)\n"
     "h = Gather(x, i)"), None, None),
    ("tokens that an input masks not, and which see masked ones only", attention(inputs="int64[b, n] m", allowed=
     "real = Cast<to = 9>(m)\n keys = Unsqueeze(real, second)\n own = LessOrEqual(row, nought)\n allowed = And(own, keys)"),
     "attention is not causal", "c"),
    ("a batch masked by its first sequence", attention(inputs="int64[b, n] m", allowed="real = Cast<to = 9>(m)\n"
     "every = Unsqueeze(real, second)\n keys = Slice(every, first, second, first)\n causal = LessOrEqual(row, column)\n"
     "allowed = And(causal, keys)"), "changes another sequence of the batch", "c"),
    ("a length behind scores that are summed up after their product", attention(constants="float tenth = {0.1}").replace(
     "w = Softmax<axis = -1>(masked_scores)\n  c = MatMul(w, v)\n  logits = Identity(c)",
     "w = Exp(masked_scores)\n total = ReduceSum(w, third)\n sum = MatMul(w, v)\n c = Div(sum, total)\n"
     "long = Cast<to = 1>(length)\n share = Mul(long, tenth)\n late = Less(nought, column)\n"
     "factor = Where(late, share, half)\n logits = Mul(c, factor)"), "depend on the total length", "factor"),
    ("at a fixed length, queries that later keys leave without any", attention(constants="float inf = {1.0}, float zero = {0.0}",
     allowed="late = Greater(row, column)\n allowed = Identity(late)", masked="most = Div(inf, zero)\n"
     "infinite = Where(allowed, most, s)\n masked_scores = Identity(infinite)").replace("[b, n, 8]", "[1, 9, 8]").replace(
     "w = Softmax<axis = -1>(masked_scores)", "sharp = Softmax<axis = -1>(masked_scores)\n not = IsNaN(sharp)\n"
     "none = Sub(half, half)\n w = Where(not, none, sharp)"), "no weight to any key", "c"),
    ("half the tokens", attention(after="logits = Slice(c, first, third, second)"), "by their position in the sequence",
     "logits"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason", "at"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_refused(text, reason, at):
    with pytest.raises(UnsupportedError) as refusal:
        Subject.of(read(text)).decoder()
    assert refusal.value.exit_code == 3
    assert "\n" not in str(refusal.value)
    if reason is not None:
        assert reason in str(refusal.value)
    if at is not None:
        assert refusal.value.at == at


FUSED = """case (float[b, n, 8] x) => (float[b, n, 8] logits)
<float[8, 8] wk, int64 one = {{1}}, int64 nought = {{0}}, int64[1] first = {{0}}, int64[1] second = {{1}}>
{{
  k = MatMul(x, wk)
  sizes = Shape(x)
  length = Gather(sizes, one)
  at = Range(nought, length, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  {body}
}}"""


@pytest.mark.parametrize(
    "body",
    ["logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k)",
     "m = GreaterOrEqual(row, column)\n logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k, m)"],
    ids=["no mask", "a mask the other way round"],
)  # fmt: skip
def test_a_fused_attention_that_sees_the_future(body):
    with pytest.raises(UnsupportedError, match="attention is not causal"):
        Subject.of(read(FUSED.format(body=body), opset=23)).decoder()


def test_a_fused_attention_whose_mask_is_made_of_tokens():
    body = (
        "last = Constant<value_ints = [2]>()\n zero = Constant<value_float = 0.0>()\n loud = ReduceMax(x, last)\n"
        "loud4 = Unsqueeze(loud, second)\n told = Greater(loud4, zero)\n flat = Transpose<perm = [0, 1, 3, 2]>(told)\n"
        "causal = LessOrEqual(row, column)\n m = And(flat, causal)\n"
        "logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k, m)"
    )
    with pytest.raises(UnsupportedError, match="its mask is made of tokens"):
        Subject.of(read(FUSED.format(body=body), opset=23)).decoder()


def test_a_fused_attention_with_a_causal_mask_is_none_of_these():
    body = "m = LessOrEqual(row, column)\n logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k, m)"
    assert Subject.of(read(FUSED.format(body=body), opset=23)).decoder().attentions[0].mask.kind == "causal"


def test_the_same_attention_with_nothing_wrong_is_accepted():
    assert len(Subject.of(read(attention())).decoder().attentions) == 1


def test_the_layer_is_named():
    text = attention(
        after="q2 = MatMul(c, wq)\n k2 = MatMul(c, wk)\n kt2 = Transpose<perm = [0, 2, 1]>(k2)\n s2 = MatMul(q2, kt2)\n"
        "w2 = Softmax<axis = -1>(s2)\n logits = MatMul(w2, c)"
    )
    with pytest.raises(UnsupportedError, match="layer 1: attention is not causal"):
        Subject.of(read(text)).decoder()


def test_scores_too_large_for_the_model_itself_say_nothing():
    """exp(s) / exp(s) of a large score is no number: smaller ones are tried then."""
    assert_law_of(attention(scores="g = Exp(s0)\n r = Div(g, g)\n s = Mul(s0, r)"))
