"""Attention to an input of another length needs no cache over time; attention to the decoder's own tokens does."""

from __future__ import annotations

import numpy as np
import pytest
from attentions import attention
from exports import injected
from laws import ALLOWED, assert_law, difference, in_onnxruntime
from written import read

from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.passes.contract import Subject

KEYS = "ek = MatMul(encoder, wk)\n ekt = Transpose<perm = [0, 2, 1]>(ek)\n cq = MatMul(c, wq)\n cs = MatMul(cq, ekt)\n"
VALUES = "cw = Softmax<axis = -1>(cm)\n ev = MatMul(encoder, wv)\n logits = MatMul(cw, ev)"
CROSS = f"{KEYS} cm = Identity(cs)\n {VALUES}"
PLACES = (
    "esizes = Shape(encoder)\n elength = Gather(esizes, one)\n eat = Range(nought, elength, one)\n"
    "erow = Unsqueeze(eat, first)\n"
)
ENCODER = "float[b, e, 8] encoder"
MASK = "int64[b, e] encoder_mask"


def whole(encoder_length: int, *, mask: bool = False) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    feeds = {
        "x": random.standard_normal((2, 9, 8)).astype(np.float32),
        "encoder": random.standard_normal((2, encoder_length, 8)).astype(np.float32),
    }
    if mask:
        feeds["encoder_mask"] = np.ones((2, encoder_length), np.int64)
        feeds["encoder_mask"][1, 2:] = 0
    return feeds


@pytest.mark.parametrize("encoder_length", [1, 4, 30])
def test_keys_of_another_length_are_no_keys_to_cache(encoder_length):
    model = read(attention(inputs=ENCODER, after=CROSS))
    result = injected(model)
    assert [value.name for value in result.graph.input] == [
        "x", "encoder", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    assert_law(model, result, whole(encoder_length))


def test_the_facts_name_its_keys():
    (found,) = Subject.of(read(attention(inputs=ENCODER, after=CROSS))).decoder().cross_attentions
    assert (found.kind, found.inputs, found.key_length, found.scores) == ("cross", ("encoder",), "e", "cs")
    (found,) = Subject.of(read(attention(inputs="float[b, 5, 8] encoder", after=CROSS))).decoder().cross_attentions
    assert found.key_length == 5


SPLIT = "t{0} = Reshape({1}, heads)\n {0} = Transpose<perm = [0, 2, 1, 3]>(t{0})\n"


@pytest.mark.parametrize("mask", ["", "encoder_mask"])
def test_one_operator_may_compute_it(mask):
    projected = "eq = MatMul(c, wq)\n ek = MatMul(encoder, wk)\n ev = MatMul(encoder, wv)\n"
    split = "".join(SPLIT.format(*pair) for pair in (("q4", "eq"), ("k4", "ek"), ("v4", "ev")))
    on = "em = Cast<to = 9>(encoder_mask)\n em4 = Unsqueeze(em, middle)\n" if mask else ""
    on += "every = Equal(column, column)\n on = And(em4, every)\n" if mask else ""
    joined = f"{on} o = Attention(q4, k4, v4{', on' if mask else ''})\n ot = Transpose<perm = [0, 2, 1, 3]>(o)\n"
    text = attention(
        inputs=f"{ENCODER}, {MASK}" if mask else ENCODER,
        constants="int64[4] heads = {0, -1, 2, 4}, int64[3] merged = {0, -1, 8}, int64[2] middle = {1, 2}",
        after=f"{projected}{split}{joined} logits = Reshape(ot, merged)",
    )
    model = read(text, opset=23)
    (found,) = Subject.of(model).decoder().cross_attentions
    assert (found.key, found.value, found.kv_heads, found.head_dim) == ("k4", "v4", 2, 4)
    assert_law(model, injected(model), whole(4, mask=bool(mask)))


def test_the_length_of_the_encoder_may_be_fixed():
    model = read(attention(inputs="float[b, 5, 8] encoder", after=CROSS))
    assert_law(model, injected(model), whole(5))


def test_the_length_of_the_encoder_may_have_the_name_of_a_length_of_tokens():
    model = read(attention(inputs="float[b, sequence_length, 8] encoder", after=CROSS))
    result = injected(model)
    dims = [size.dim_param for size in result.graph.input[1].type.tensor_type.shape.dim]
    assert dims[:2] == ["batch_size", "encoder_sequence_length"]
    assert_law(model, result, whole(4))


def test_the_encoder_may_be_padded():
    mask = "em = Unsqueeze(encoder_mask, second)\n on = Cast<to = 9>(em)\n cm = Where(on, cs, low)\n"
    model = read(attention(inputs=f"{ENCODER}, {MASK}", after=KEYS + mask + VALUES))
    assert_law(model, injected(model), whole(4, mask=True))


def test_the_mask_of_the_encoder_may_be_repeated_for_each_token():
    mask = (
        "em = Unsqueeze(encoder_mask, second)\n esizes = Shape<start = 1>(encoder_mask)\n bsize = Shape<end = 1>(x)\n"
        "nsize = Shape<start = 1, end = 2>(x)\n target = Concat<axis = 0>(bsize, nsize, esizes)\n"
        "wide = Expand(em, target)\n on = Cast<to = 9>(wide)\n cm = Where(on, cs, low)\n"
    )
    model = read(attention(inputs=f"{ENCODER}, {MASK}", after=KEYS + mask + VALUES))
    assert_law(model, injected(model), whole(4, mask=True))


@pytest.mark.parametrize("encoder_length", [4, 30])
def test_a_mask_of_tokens_against_the_encoder_is_computed_for_the_new_tokens(encoder_length):
    mask = f"{PLACES} near = LessOrEqual(erow, column)\n cm = Where(near, cs, low)\n"
    model = read(attention(inputs=ENCODER, after=KEYS + mask + VALUES))
    assert_law(model, injected(model), whole(encoder_length))


def test_the_encoder_may_be_the_first_input():
    text = attention(inputs="float[b, m, 8] x", after=CROSS).replace("float[b, n, 8] x", ENCODER, 1)
    model = read(text.replace("float[b, n, 8] logits", "float[b, m, 8] logits"))
    assert_law(model, injected(model), whole(4))


def test_a_mask_that_depends_on_both_lengths_is_refused():
    mask = f"{PLACES} late = Add(column, elength)\n near = GreaterOrEqual(late, length)\n cm = Where(near, cs, low)\n"
    with pytest.raises(UnsupportedError) as refusal:
        injected(read(attention(inputs=ENCODER, after=KEYS + mask + VALUES)))
    assert refusal.value.code is Code.LENGTH_DEPENDENT


OTHER = "float[b, e, 8] other"
OWN_TOKENS = {
    "tokens": ("encoder = Identity(c)", ""),
    "projected tokens": ("encoder = MatMul(x, wq)", ""),
    "a sum with tokens": ("encoder = Add(x, other)", OTHER),
    "tokens next to others": ("encoder = Concat<axis = 1>(x, other)", OTHER),
    "an input as long as the tokens": ("", "float[b, n, 8] encoder"),
}


@pytest.mark.parametrize(("keys", "inputs"), OWN_TOKENS.values(), ids=OWN_TOKENS)
def test_keys_of_the_tokens_themselves_must_be_masked(keys, inputs):
    with pytest.raises(UnsupportedError):
        injected(read(attention(inputs=inputs, after=f"{keys}\n {CROSS}")))


def test_an_encoder_inside_the_model_is_refused():
    encoder = (
        "eq = MatMul(given, wq)\n eqt = Transpose<perm = [0, 2, 1]>(given)\n es = MatMul(eq, eqt)\n"
        "ew = Softmax<axis = -1>(es)\n encoder = MatMul(ew, given)\n"
    )
    with pytest.raises(UnsupportedError, match=r"contains an encoder.*`given`"):
        injected(read(attention(inputs="float[b, e, 8] given", after=encoder + CROSS)))


def test_the_text_may_be_before_the_batch():
    swap = "Transpose<perm = [1, 0, 2]>"
    text = attention(hidden=f"h = {swap}(x)", after=f"logits = {swap}(c)").replace("float[b, n, 8]", "float[n, b, 8]")
    model = read(text.replace("Gather(sizes, one)", "Gather(sizes, nought)"))
    feeds = {"x": np.random.default_rng(5).standard_normal((9, 2, 8)).astype(np.float32)}
    result = injected(model)
    past = {name: np.zeros((2, 1, 0, 8), np.float32) for name in ("past_key_values.0.key", "past_key_values.0.value")}
    found, run = [], in_onnxruntime(result)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        step = run({"x": feeds["x"][start:stop], **past})
        past = {name: step[name.replace("past_key_values", "present")] for name in past}
        found.append(step["logits"])
    assert difference(np.concatenate(found), in_onnxruntime(model)(feeds)["logits"]) < ALLOWED["float32"]
