"""Constants that no length has, in every place where one becomes a size, an index or a bound: refused, or right."""

# ruff: noqa: E501  # a case is read best on one line

import numpy as np
import onnx
import pytest
from attentions import attention, in_order
from exports import injected
from laws import assert_law, in_onnxruntime
from onnx import numpy_helper
from written import read

from kvsurgeon.errors import KvsurgeonError
from kvsurgeon.passes.contract import Subject

WHOLE = [np.int64(number) for number in (2**62, np.iinfo(np.int64).min, 2**31)]
REAL = [np.float32(number) for number in (np.inf, -np.inf, np.nan, 1e30, 2.0**63)]
OPERATORS = {  # from `at [n]`, `length` and `huge`, all int64, to `places [n]`
    "end of a Slice": "places = Slice(at, first, huge_1, first)",
    "start of a Slice": "places = Slice(at, huge_1, to_the_end, first)",
    "step of a Slice": "places = Slice(at, first, to_the_end, first, huge_1)",
    "sum as an end of a Slice": "end = Add(length_1, huge_1)\n places = Slice(at, first, end, first)",
    "end of a Slice of a shape": "s = Shape(at)\n s1 = Slice(s, first, huge_1, first)\n n = Squeeze(s1)\n places = Range(nought, n, one)",
    "limit of a Range": "r = Range(nought, huge, one)\n places = Slice(r, first, length_1, first)",
    "start of a Range": "e = Add(huge, length)\n places = Range(huge, e, one)",
    "step of a Range": "places = Range(nought, length, huge)",
    "index of a Gather": "g = Gather(at, huge_1)\n places = Add(at, g)",
    "index of a Gather from a shape": "s = Shape(at)\n g = Gather(s, huge_1)\n places = Add(at, g)",
    "Pad behind": "z = Identity(first)\n pads = Concat<axis=0>(z, huge_1)\n p = Pad(at, pads)\n places = Slice(p, first, length_1, first)",
    "Pad in front": "m = Neg(huge_1)\n pads = Concat<axis=0>(huge_1, m)\n places = Pad(at, pads)",
    "Expand": "e = Expand(one, huge_1)\n places = Slice(e, first, length_1, first)",
    "Expand to a difference": "a = Add(length_1, huge_1)\n s = Sub(a, huge_1)\n places = Expand(one, s)",
    "Tile": "t = Tile(at, huge_1)\n places = Slice(t, first, length_1, first)",
    "Tile of a length": "t = Tile(length_1, huge_1)\n places = Slice(t, first, length_1, first)",
    "Tile of a constant": "t = Tile(first, huge_1)\n places = Slice(t, first, length_1, first)",
    "Pad of a constant": "pads = Concat<axis=0>(first, huge_1)\n p = Pad(first, pads)\n places = Slice(p, first, length_1, first)",
    "Split of a constant": "parts = Concat<axis=0>(huge_1, second)\n p, places = Split<axis=0>(to_the_end, parts)",
    "Gather of equal numbers": "s = Expand(second, huge_1)\n g = Gather(second, s)\n places = Slice(g, first, length_1, first)",
    "ConstantOfShape": "c0 = ConstantOfShape<value = int64[1] {1}>(huge_1)\n places = Slice(c0, first, length_1, first)",
    "CumSum": "e = Expand(huge, length_1)\n places = CumSum(e, nought)",
    "axis of a CumSum": "places = CumSum(at, huge)",
    "Mod": "places = Mod(at, huge)",
    "Div": "places = Div(at, huge)",
    "Pow": "p = Pow(huge, huge)\n places = Min(at, p)",
    "sum and difference": "a = Add(at, huge)\n places = Sub(a, huge)",
    "Min and Max": "a = Min(at, huge)\n places = Max(a, huge)",
    "TopK": "f = Cast<to=1>(at)\n v, i = TopK<axis=0>(f, huge_1)\n places = Slice(i, first, length_1, first)",
    "Reshape": "places = Reshape(at, huge_1)",
    "ScatterElements": "places = ScatterElements(at, huge_1, first)",
    "diagonal of a Trilu": "w2 = Concat<axis=0>(length_1, length_1)\n o = ConstantOfShape<value = int64[1] {1}>(w2)\n t = Trilu<upper=0>(o, huge)\n places = ReduceMax<keepdims=0>(t, first)",
    "Where": "less = Less(at, huge)\n places = Where(less, at, huge)",
    "product with the length": "p = Mul(length, huge)\n l = GreaterOrEqual(p, huge)\n f = Cast<to=7>(l)\n places = Mul(at, f)",
}  # fmt: skip


def assert_refused_or_right(places: str, huge: np.generic) -> None:
    allowed = f"{places}\n u = Unsqueeze(places, first)\n p = GreaterOrEqual(u, nought)\n causal = LessOrEqual(row, column)\n allowed = And(causal, p)"
    constants = "int64[1] to_the_end = {9223372036854775807}"
    model = in_order(read(attention(allowed=f"length_1 = Reshape(length, second)\n {allowed}", constants=constants)))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(huge), "huge"))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray([huge]), "huge_1"))
    try:
        result = injected(model)
    except KvsurgeonError:
        return
    if _runs(model):
        assert_law(model, result)


def _runs(model: onnx.ModelProto) -> bool:
    try:
        in_onnxruntime(model)({"x": np.zeros((1, 9, 8), np.float32)})
    except Exception:
        return False
    return True


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_constant_that_no_length_has_is_refused_or_right(operator):
    for huge in WHOLE:
        assert_refused_or_right(OPERATORS[operator], huge)


@pytest.mark.parametrize("huge", REAL, ids=str)
def test_so_is_a_float_that_no_integer_holds(huge):
    assert_refused_or_right("h = Cast<to=7>(huge)\n places = Add(at, h)", huge)
    assert_refused_or_right("f = Cast<to=1>(at)\n m = Min(f, huge)\n places = Cast<to=7>(m)", huge)


def test_numbers_of_a_constant_that_doubles_thirty_times_are_not_followed():
    doubling = "\n".join(f"d{place + 1} = Concat<axis = 0>(d{place}, d{place})" for place in range(30))
    hidden = f"d0 = Identity(second)\n {doubling}\n most = ReduceMax<keepdims = 0>(d30)\n f = Cast<to = 1>(most)\n h = Mul(x, f)"
    shapes = Subject.of(read(attention(hidden=hidden))).analysis().flow.shapes
    facts = {value.name: fact for value, fact in shapes.facts.items()}
    assert (facts["d9"].value.size, facts["d30"].shape, facts["d30"].value) == (512, (2**30,), None)
