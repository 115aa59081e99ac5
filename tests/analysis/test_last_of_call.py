"""The last tokens of a call, of which an input gives the number."""

import numpy as np
import pytest
from attentions import attention, in_order
from exports import injected
from laws import difference, in_onnxruntime, texts
from written import read

import kvsurgeon
from kvsurgeon.errors import Code, UnsupportedError

INPUTS = "int64 keep"
CONSTANTS = "int64 two = {2}, int64[1] end = {9223372036854775807}"
LAST = """start = Sub(length, keep)
 kept = Range(start, length, one)
 g = Gather<axis = 1>(c, kept)
 logits = Tanh(g)"""

SLICED = """back = Neg(keep)
 start = Unsqueeze(back, first)
 g = Slice(c, start, end, second)
 logits = Tanh(g)"""


def model(
    after: str = LAST, inputs: str = INPUTS, constants: str = "int64 two = {2}, int64[1] end = {9223372036854775807}"
):
    written = attention(after=after, inputs=inputs, constants=constants)
    return in_order(read(written.replace("=> (float[b, n, 8] logits)", "=> (float[b, kept_tokens, 8] logits)")))


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [LAST, SLICED], ids=["gathered", "sliced"])
def test_each_call_returns_as_many_of_its_own(keep, after):
    original = model(after)
    cached = injected(original)
    x = texts(original, length=9)["x"]
    run, past = in_onnxruntime(cached), [np.zeros((2, 1, 0, 8), np.float32)] * 2
    for start, end in ((0, 3), (3, 6), (6, 9)):
        count = np.array(keep)
        expected = in_onnxruntime(original)({"x": x[:, :end], "keep": np.array(min(keep, 3))})["logits"]
        found = run({"x": x[:, start:end], "keep": count, "past_key_values.0.key": past[0],
                     "past_key_values.0.value": past[1]})  # fmt: skip
        past = [found["present.0.key"], found["present.0.value"]]
        assert found["logits"].shape == (2, min(keep, 3), 8)
        assert difference(found["logits"], expected) < 2e-5


def test_a_slice_of_none_is_one_of_all():
    original = model(SLICED)
    x, past = texts(original, length=4)["x"], np.zeros((2, 1, 0, 8), np.float32)
    feeds = {"x": x, "keep": np.array(0)}
    found = in_onnxruntime(injected(original))(
        {**feeds, "past_key_values.0.key": past, "past_key_values.0.value": past}
    )
    assert difference(found["logits"], in_onnxruntime(original)(feeds)["logits"]) < 2e-5


def test_the_number_is_no_value_that_stays_the_same():
    (note,) = [note for note in kvsurgeon.inject(model()).notes if "keep" in note]
    assert note == "`keep` is how many of the last tokens of a call are selected"


def test_a_number_that_is_read_otherwise_too_stays_the_same():
    scaled = LAST.replace("Tanh(g)", "Mul(g, f)") + "\n f = Cast<to = 1>(keep)"
    notes = [note for note in kvsurgeon.inject(model(scaled)).notes if "keep" in note]
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Range(start, length, one)", "Range(nought, keep, one)"),
        ("Sub(length, keep)", "Sub(two, keep)"),
        ("kept = Range(start, length, one)", "k1 = Range(start, length, one)\n kept = Sub(k1, one)"),
        ("Range(start, length, one)", "Range(start, length, two)"),
        ("kept = Range(start, length, one)", "k1 = Range(start, length, one)\n kept = Sub(length, k1)"),
        ("Sub(length, keep)", "Sub(half_length, keep)\n half_length = Div(length, two)"),
    ],
    ids=["the first", "from a fixed place", "one before", "every second", "other order", "before the middle"],
)  # fmt: skip
def test_other_places_are_rejected(old, new):
    with pytest.raises(UnsupportedError) as refused:
        injected(model(LAST.replace(old, new)))
    assert refused.value.code in (Code.SELECTS_BY_POSITION, Code.UNTRACEABLE_SEQUENCE)


def test_the_last_of_the_whole_text_are_rejected():
    total = LAST.replace("Sub(length, keep)", "Sub(total, keep)").replace("(start, length, one)", "(start, total, one)")
    total += "\n ms = Shape(attention_mask)\n total = Gather(ms, one)"
    with pytest.raises(UnsupportedError):
        injected(model(total, inputs="int64 keep, int64[b, n] attention_mask"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("Slice(c, start, end, second)", "Slice(c, first, start, second)"), ("back = Neg(keep)", "back = Identity(keep)"),
     ("back = Neg(keep)", "n = Neg(keep)\n back = Sub(n, one)")],
    ids=["all but the last", "all but the first", "one more"],
)  # fmt: skip
def test_other_slices_are_rejected(old, new):
    with pytest.raises(UnsupportedError):
        injected(model(SLICED.replace(old, new)))


def test_two_numbers_are_rejected():
    both = LAST.replace("Sub(length, keep)", "Sub(less, drop)\n less = Sub(length, keep)")
    with pytest.raises(UnsupportedError, match="selects tokens by their position"):
        injected(model(both, inputs="int64 keep, int64 drop"))


def test_they_must_not_reach_other_tokens():
    with pytest.raises(UnsupportedError):
        injected(model(LAST.replace("Tanh(g)", "Add(c, mean)\n mean = ReduceMean<keepdims = 1>(g, second)")))
