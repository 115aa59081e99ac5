"""Scores for distances that are shifted to keys, as in Transformer-XL, XLNet and the Music Transformer."""

import numpy as np
import onnx
import pytest
from attentions import attention, in_order
from exports import after, injected, operators
from laws import assert_law
from written import read

from kvsurgeon.decompose import decompose
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.contract import Subject

CONSTANTS = (
    "float[24, 8] learned, float[129, 8] table, float[129] biases, int64[1] middle = {64}, int64[1] last = {-1}, "
    "int64[1] far = {1000000000}, "
    "int64[6] in_front = {0, 0, 1, 0, 0, 0}, int64[6] behind = {0, 0, 0, 0, 0, 1}"
)
HIDDEN = """positions = Slice(learned, first, n, first)
 h = Add(x, positions)"""
SIZES = """n = Unsqueeze(length, first)
 batch = Slice(sizes, first, second, first)
 more = Add(n, second)
 twice = Add(n, n)
 odd = Sub(twice, second)
 start = Sub(middle, n)
 s = Add(s0, shifted)
"""


def shift(rows: str, shifted: str) -> str:
    """Return the text of scores for the distances of `rows [.., 8]` that are `shifted` to keys."""
    return f"""{SIZES}
 {rows}
 turned = Transpose<perm = [1, 0]>(rows)
 distances = MatMul(q, turned)
 {shifted}"""


PAST = "rows = Slice(table, start, middle, first)"
BOTH = "end = Add(middle, n)\n rows = Slice(table, start, end, first)"
ODD = "end = Add(start, odd)\n rows = Slice(table, start, end, first)"
IN_FRONT = """padded = Pad(distances, in_front)
 other = Concat<axis = 0>(batch, more, n)
 turn = Reshape(padded, other)
 shifted = Slice(turn, second, far, second)"""
BEHIND = """padded = Pad(distances, behind)
 longer = Add(twice, second)
 other = Concat<axis = 0>(batch, longer, n)
 turn = Reshape(padded, other)
 fewer = Slice(turn, first, last, second)
 same = Shape(distances)
 all = Reshape(fewer, same)
 minus = Neg(n)
 shifted = Slice(all, minus, far, third)"""
IN_OTHER_ROWS = """other = Concat<axis = 0>(batch, twice, n)
 turn = Reshape(distances, other)
 later = Slice(turn, second, far, second)
 back = Concat<axis = 0>(batch, n, odd)
 all = Reshape(later, back)
 shifted = Gather<axis = 2>(all, at)"""
JUST_ENOUGH = """other = Concat<axis = 0>(batch, more, n)
 turn = Reshape(distances, other)
 later = Slice(turn, second, far, second)
 shifted = Gather<axis = 2>(later, at)"""
ZEROS = """each = Concat<axis = 0>(batch, n, second)
 zeros = ConstantOfShape(each)
 padded = Concat<axis = 2>(zeros, distances)
 other = Concat<axis = 0>(batch, twice, n)
 turn = Reshape(padded, other)
 later = Slice(turn, second, far, second)
 same = Shape(distances)
 all = Reshape(later, same)
 shifted = Slice(all, first, n, third)"""
WITH_BIAS = (
    BEHIND.replace("(distances", "(biased") + "\n of_each = Slice(biases, start, end, first)"
    "\n one_row = Unsqueeze(of_each, first)\n biased = Add(distances, one_row)"
)
WITH_OWN = "end = Add(middle, second)\n rows = Slice(table, start, end, first)"
GATHERED = """apart = Sub(row, column)
 columns = Add(apart, beginning)
 beginning = Sub(length, one)
 everywhere = Concat<axis = 0>(batch, n, n)
 each = Expand(columns, everywhere)
 shifted = GatherElements<axis = 2>(distances, each)"""
SHIFTS = {
    "keys before the query, padded in front": (PAST, IN_FRONT),
    "keys on both sides, padded behind": (BOTH, BEHIND),
    "with a bias for each distance": (BOTH, WITH_BIAS),
    "keys on both sides, read in other rows": (BOTH, IN_OTHER_ROWS),
    "no distance after the query, read in other rows": (WITH_OWN, JUST_ENOUGH),
    "an odd number of distances, after zeros": (ODD, ZEROS),
    "columns that the graph gathers": (ODD, GATHERED),
}


def model_of(rows: str, shifted: str, **parts: str) -> onnx.ModelProto:
    text = attention(scores=shift(rows, shifted), constants=CONSTANTS, hidden=HIDDEN, **parts)
    return in_order(read(text))


@pytest.mark.parametrize(("rows", "shifted"), SHIFTS.values(), ids=SHIFTS)
def test_shifted_scores_get_a_cache(rows, shifted):
    model = model_of(rows, shifted)
    x = np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32)
    result = injected(model)
    assert_law(model, result, {"x": x})
    assert "GatherElements" in operators(result)  # no row for each query and key


def test_the_result_loses_its_cache_and_gets_it_again():
    model = model_of(BOTH, WITH_BIAS)
    again = injected(after(injected(model), RemoveCache()))
    x = np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32)
    assert_law(model, again, {"x": x})


BROKEN = {
    "keys after the query have weight": (PAST, IN_FRONT, {"allowed": "allowed = LessOrEqual(row, reach)\n"
     " reach = Add(column, one)"}, Code.NOT_CAUSAL),
    "no mask": (BOTH, BEHIND, {"masked": "masked_scores = Identity(s)"}, Code.NOT_CAUSAL),
    "the distance of a key depends on the length": ("rows = Slice(table, first, n, first)", IN_FRONT, {}, None),
    "rows of another order": (PAST.replace("rows =", "past =") + "\n rows = Where(is_long, past, others)"
     "\n others = Neg(past)\n is_long = Greater(length, one)", IN_FRONT, {}, None),
    "columns that are counted from the end": (ODD, GATHERED.replace("beginning = Sub(length, one)", "beginning = Sub("
     "least, one)\n six = Mul(two, three)\n two = Add(one, one)\n three = Add(two, one)\n least = Max(length, six)"),
     {}, None),
    "a column too many is cut off": (PAST, IN_FRONT.replace("Slice(turn, second, far, second)", "Slice(turn, first, n, "
     "second)"), {}, Code.UNTRACEABLE_SEQUENCE),
    "a bound that is no multiple of the length": (BOTH, BEHIND.replace("minus = Neg(n)", "square = Mul(n, n)\n"
     " least = Min(square, middle)\n short = Sub(n, least)\n lower = Sub(short, n)\n minus = Max(lower, under)\n"
     " under = Neg(n)"), {}, None),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "shifted", "parts", "code"), BROKEN.values(), ids=BROKEN)
def test_other_shifts_are_rejected(rows, shifted, parts, code):
    with pytest.raises(UnsupportedError) as caught:
        injected(model_of(rows, shifted, **parts))
    assert code is None or caught.value.code is code


def test_a_model_without_shifts_stays_as_it_is():
    subject = Subject.of(read(attention()))
    assert decompose(subject.model).model is subject.model
