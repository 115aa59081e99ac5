"""Models that the proof rejects, the value that each error names, and the obligations of accepted ones."""

# ruff: noqa: E501  # a case is read best on one line

import pytest
from attentions import assert_law_of, attention
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject

# cos and sin of positions times frequencies; `{frequencies}` computes the frequencies `f [8]`
ROTATED = """place = Cast<to = 1>(column)
  {frequencies}
  angle = Mul(place, f)
  wave = Cos(angle)
  k = Mul(k0, wave)"""
LENGTH_AS_FLOAT = "long = Cast<to = 1>(length)"
WEIGHTS = "float[8] base = {1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01}, float[8] other"

REJECTED = [
    ("no mask", attention(masked="masked_scores = Identity(s)"), "attention is not causal", "c"),
    ("a reversed causal mask", attention(allowed="allowed = GreaterOrEqual(row, column)"), "attention is not causal", "c"),
    ("a window with one later key",
     attention(allowed="d = Sub(row, column)\n allowed = LessOrEqual(d, one)"), "attention is not causal", "c"),
    ("a bidirectional prefix",
     attention(allowed="early = Less(row, four)\n late = LessOrEqual(row, column)\n allowed = Or(early, late)",
               constants="int64 four = {4}"), "attention is not causal", "c"),
    ("a mask bias that is too small", attention(constants="float little = {2.0}",
     masked="hidden = Sub(s, little)\n masked_scores = Where(allowed, s, hidden)"), "attention is not causal", "c"),
    ("keys counted from the end", attention(allowed="end = Sub(length, one)\n back = Sub(end, row)\n"
     "causal = LessOrEqual(row, column)\n late = Less(back, three)\n own = Equal(row, column)\n near = Or(late, own)\n allowed = And(causal, near)",
     constants="int64 three = {3}"), "depend on the total length", "c"),
    ("frequencies by length (dynamic NTK)", attention(constants=WEIGHTS, key=ROTATED.format(
        frequencies=f"{LENGTH_AS_FLOAT}\n f = Div(base, long)")), "depend on the total length", "wave"),
    ("frequencies that switch at a short length (LongRoPE)", attention(constants=f"{WEIGHTS}, int64 sixteen = {{16}}",
     key=ROTATED.format(frequencies="far = Greater(length, sixteen)\n f = Where(far, other, base)")),
     "depend on the total length", "wave"),
    ("queries without any key", attention(constants="float inf = {1.0}, float zero = {0.0}",
     masked="never = Div(inf, zero)\n least = Neg(never)\n bias = Where(allowed, least, least)\n"
     "masked_scores = Add(s, bias)"), "attention weights are NaN", "c"),
    ("a custom mask", attention(allowed="allowed = somebodys.Mask(row, column)",
     constants="bool[n, n] allowed"), "cannot run the context", None),
    ("two sequence axes that no product sums", attention().replace("c = MatMul(w, v)", "c = ReduceMax(w, third)"),
     "two sequence axes meet, but neither is summed", "s0"),
    ("softmax over tokens outside attention", attention(hidden="h = Softmax<axis = 1>(x)"), "Softmax mixes tokens", "h"),
    ("a maximum over tokens", attention(hidden="m = ReduceMax(x, second)\n h = Sub(x, m)"), "ReduceMax mixes", "m"),
    ("an argmax over tokens", attention(hidden="m = ArgMax<axis = 1>(x)\n f = Cast<to = 1>(m)\n h = Sub(x, f)"),
     "ArgMax mixes", "m"),
    ("tokens sorted", attention(hidden="h, i = TopK<axis = 1>(x, third)"), "TopK mixes", "h"),
    ("a norm along tokens", attention(hidden="h = LpNormalization<axis = 1>(x)"), "LpNormalization mixes", "h"),
    ("tokens split", attention(hidden="a, z = Split<axis = 1, num_outputs = 2>(x)\n h = Concat<axis = 1>(z, a)"),
     "Split mixes", "a"),
    ("queries added to keys", attention(scores="t = Transpose<perm = [0, 2, 1]>(s0)\n s = Add(s0, t)"),
     "cannot distinguish queries from keys", None),
    ("indices computed from tokens", attention(hidden="m = ReduceMax<keepdims = 0>(x, third)\n i = Cast<to = 7>(m)\n"
     "h = Gather(x, i)"), None, None),
    ("unmasked queries whose keys are all masked", attention(inputs="int64[b, n] m", allowed=
     "real = Cast<to = 9>(m)\n keys = Unsqueeze(real, second)\n own = LessOrEqual(row, nought)\n allowed = And(own, keys)"),
     "attention is not causal", "c"),
    ("a batch masked by the mask of its first sequence", attention(inputs="int64[b, n] m", allowed="real = Cast<to = 9>(m)\n"
     "every = Unsqueeze(real, second)\n keys = Slice(every, first, second, first)\n causal = LessOrEqual(row, column)\n"
     "allowed = And(causal, keys)"), "changes another sequence of the batch", "c"),
    ("batches of seven that see ahead", attention(constants="int64 seven = {7}", allowed="causal = LessOrEqual(row, column)\n"
     "sequences = Gather(sizes, nought)\n here = Equal(sequences, seven)\n allowed = Or(causal, here)"),
     "attention is not causal", "c"),
    ("a seventh sequence that sees ahead", attention(constants="int64 five = {5}", allowed="causal = LessOrEqual(row, column)\n"
     "count = Gather(sizes, nought)\n numbers = Range(nought, count, one)\n by_sequence = Unsqueeze(numbers, late)\n"
     "late = Concat<axis = 0>(second, third)\n here = Greater(by_sequence, five)\n allowed = Or(causal, here)"),
     "attention is not causal", "c"),
    ("batches of seven, by their square", attention(constants="int64 number = {49}", allowed="causal = LessOrEqual(row, column)\n"
     "sequences = Gather(sizes, nought)\n square = Mul(sequences, sequences)\n here = Equal(square, number)\n"
     "allowed = Or(causal, here)"), "attention is not causal", "c"),
    ("batches of seven, by a table", attention(constants="int64[9] table = {0, 0, 0, 0, 0, 0, 0, 1, 0}",
     allowed="causal = LessOrEqual(row, column)\n sequences = Gather(sizes, nought)\n here = Gather(table, sequences)\n"
     "open = Cast<to = 9>(here)\n allowed = Or(causal, open)"), "attention is not causal", "c"),
    ("a seventh sequence that sees ahead, by its number times ten", attention(constants="int64 ten = {10}, int64 many = {55}",
     allowed="causal = LessOrEqual(row, column)\n count = Gather(sizes, nought)\n numbers = Range(nought, count, one)\n"
     "tens = Mul(numbers, ten)\n by_sequence = Unsqueeze(tens, late)\n late = Concat<axis = 0>(second, third)\n"
     "here = Greater(by_sequence, many)\n allowed = Or(causal, here)"), "attention is not causal", "c"),
    ("a seventh sequence that sees ahead, by its number for each token", attention(constants="int64 five = {5}",
     allowed="causal = LessOrEqual(row, column)\n count = Gather(sizes, nought)\n numbers = Range(nought, count, one)\n"
     "by_sequence = Unsqueeze(numbers, late)\n late = Concat<axis = 0>(second, third)\n counts = Unsqueeze(count, first)\n"
     "lengths = Unsqueeze(length, first)\n whole = Concat<axis = 0>(counts, lengths, lengths)\n"
     "each = Expand(by_sequence, whole)\n here = Greater(each, five)\n allowed = Or(causal, here)"),
     "attention is not causal", "c"),
    ("batches of seven, by their root", attention(constants="float number = {2.6}", allowed="causal = LessOrEqual(row, column)\n"
     "sequences = Gather(sizes, nought)\n real = Cast<to = 1>(sequences)\n root = Sqrt(real)\n"
     "here = Greater(root, number)\n allowed = Or(causal, here)"), "attention is not causal", "c"),
    ("batches of seven, by a part of a table", attention(constants="int64[9] table = {0, 0, 0, 0, 0, 0, 0, 1, 0}",
     allowed="causal = LessOrEqual(row, column)\n count = Slice(sizes, first, second)\n next = Add(count, second)\n"
     "here = Slice(table, count, next)\n open = Cast<to = 9>(here)\n allowed = Or(causal, open)"),
     "attention is not causal", "c"),
    ("a factor of the length after a softmax that is normalized last", attention(constants="float tenth = {0.1}").replace(
     "w = Softmax<axis = -1>(masked_scores)\n  c = MatMul(w, v)\n  logits = Identity(c)",
     "w = Exp(masked_scores)\n total = ReduceSum(w, third)\n sum = MatMul(w, v)\n c = Div(sum, total)\n"
     "long = Cast<to = 1>(length)\n share = Mul(long, tenth)\n late = Less(nought, column)\n"
     "factor = Where(late, share, half)\n logits = Mul(c, factor)"), "depend on the total length", "factor"),
    ("at a fixed length, queries without any key", attention(constants="float inf = {1.0}, float zero = {0.0}",
     allowed="late = Greater(row, column)\n allowed = Identity(late)", masked="most = Div(inf, zero)\n"
     "infinite = Where(allowed, most, s)\n masked_scores = Identity(infinite)").replace("[b, n, 8]", "[1, 9, 8]").replace(
     "w = Softmax<axis = -1>(masked_scores)", "sharp = Softmax<axis = -1>(masked_scores)\n not = IsNaN(sharp)\n"
     "none = Sub(half, half)\n w = Where(not, none, sharp)"), "no weight to any key", "c"),
    ("half the tokens", attention(after="logits = Slice(c, first, third, second)"), "by their position in the sequence",
     "logits"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "reason", "at"), [pytest.param(*case[1:], id=case[0]) for case in REJECTED])
def test_rejected(text, reason, at):
    with pytest.raises(UnsupportedError) as refusal:
        Subject.of(read(text)).decoder()
    assert refusal.value.exit_code == 3
    assert "\n" not in str(refusal.value)
    if reason is not None:
        assert reason in str(refusal.value)
    if at is not None:
        assert refusal.value.at == at


FUSED = """case (float[b, n, 8] x) => (float[b, n, 8] logits)
<float[8, 8] wk, int64 one = {{1}}, int64 zero = {{0}}, int64[1] first = {{0}}, int64[1] second = {{1}}>
{{
  k = MatMul(x, wk)
  sizes = Shape(x)
  length = Gather(sizes, one)
  at = Range(zero, length, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  {body}
}}"""


@pytest.mark.parametrize(
    "body",
    ["logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k)",
     "m = GreaterOrEqual(row, column)\n logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k, m)"],
    ids=["no mask", "a reversed causal mask"],
)  # fmt: skip
def test_a_fused_attention_that_is_not_causal(body):
    with pytest.raises(UnsupportedError, match="attention is not causal"):
        Subject.of(read(FUSED.format(body=body), opset=23)).decoder()


def test_a_fused_attention_whose_mask_depends_on_tokens():
    body = (
        "last = Constant<value_ints = [2]>()\n least = Constant<value_float = 0.0>()\n largest = ReduceMax(x, last)\n"
        "largest4 = Unsqueeze(largest, second)\n positive = Greater(largest4, least)\n flat = Transpose<perm = [0, 1, 3, 2]>(positive)\n"
        "causal = LessOrEqual(row, column)\n m = And(flat, causal)\n"
        "logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k, m)"
    )
    with pytest.raises(UnsupportedError, match="its mask is made of tokens"):
        Subject.of(read(FUSED.format(body=body), opset=23)).decoder()


def test_a_fused_attention_with_a_causal_mask_is_accepted():
    body = "m = LessOrEqual(row, column)\n logits = Attention<q_num_heads = 2, kv_num_heads = 2>(x, k, k, m)"
    assert Subject.of(read(FUSED.format(body=body), opset=23)).decoder().attentions[0].mask.kind == "causal"


def test_plain_attention_is_accepted():
    assert len(Subject.of(read(attention())).decoder().attentions) == 1


def test_an_error_names_the_layer():
    text = attention(
        after="q2 = MatMul(c, wq)\n k2 = MatMul(c, wk)\n kt2 = Transpose<perm = [0, 2, 1]>(k2)\n s2 = MatMul(q2, kt2)\n"
        "w2 = Softmax<axis = -1>(s2)\n logits = MatMul(w2, c)"
    )
    with pytest.raises(UnsupportedError, match="layer 1: attention is not causal"):
        Subject.of(read(text)).decoder()


def test_scores_that_overflow_are_scaled_down():
    """exp(s) / exp(s) is NaN for large scores, so smaller ones are run."""
    assert_law_of(attention(scores="g = Exp(s0)\n r = Div(g, g)\n s = Mul(s0, r)"))


MASKED_KEYS = "real = Cast<to = 9>(m)\n keys = Unsqueeze(real, second)\n early = LessOrEqual(row, column)\n allowed = And(early, keys)"
OBLIGATIONS = [
    ("causal mask", attention(), ("measured", "proved", "proved", "proved")),
    ("causal mask and padding mask", attention(inputs="int64[b, n] m", allowed=MASKED_KEYS),
     ("measured", "proved", "measured", "measured")),
    ("a bias that is counted from the last key", attention(scores="back = Sub(row, length)\n far = Cast<to = 1>(back)\n"
     "bias = Mul(far, half)\n s = Add(s0, bias)"), ("measured", "measured", "proved", "proved")),
    ("causal operator", FUSED.format(body="logits = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(x, k, k)"),
     ("proved", "proved", "proved", "proved")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "status"), [pytest.param(*case[1:], id=case[0]) for case in OBLIGATIONS])
def test_status_of_each_obligation(text, status):
    proof = Subject.of(read(text, opset=23)).proof()
    assert [obligation.name for obligation in proof.obligations] == ["causal", "prefix-stable", "padding", "batch"]
    assert tuple(obligation.status for obligation in proof.obligations) == status
    for obligation in proof.obligations:
        assert set(obligation.lengths) >= set(proof.lengths if obligation.status == "measured" else ())
        assert bool(obligation.lengths) is (obligation.status == "measured")


def test_an_assumption_names_its_value():
    text = attention(
        constants="float[100, 8] table",
        hidden="u, scale, point = DynamicQuantizeLinear(x)\n h = DequantizeLinear(u, scale, point)",
    )
    _, stable, _, _ = Subject.of(read(text)).proof().obligations
    assert (stable.status, stable.at) == ("assumed", "u")


def test_the_proof_does_not_change_the_analysis():
    subject = Subject.of(
        read(attention(constants="float[100, 8] table", hidden="p = Gather(table, at)\n h = Add(x, p)"))
    )
    analysis = subject.analysis()
    before = set(analysis.shapes.bounds), dict(analysis.flow.assumed)
    assert 100 in subject.proof().bounds
    assert (analysis.shapes.bounds, analysis.flow.assumed) == before
