"""A number of the length that cancels between queries and keys, as the middle of the text does in xPos."""

import numpy as np
import onnx
import pytest
from attentions import attention, in_order
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Subject
from kvsurgeon.proof.cancelled_numbers import LONGEST

CONSTANTS = (
    "int64 two = {2}, float span = {512.0}, float unit = {1.0}, float edge = {0.9}, int64 bound = {700}, "
    "int64 far = {800}, float[8] scale = {0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9}"
)
SCALES = """middle = Div(length, two)
 away = Sub(column, middle)
 float_away = Cast<to = 1>(away)
 power = Div(float_away, span)
 up = Pow(scale, power)
 down = Div(unit, up)
 """
XPOS = {"query": SCALES + "q = Mul(q0, up)", "key": "k = Mul(k0, down)"}


def model_of(**parts: str) -> onnx.ModelProto:
    return in_order(read(attention(constants=CONSTANTS, **{**XPOS, **parts})))


def test_scales_that_cancel_get_a_cache():
    model = model_of()
    assert Subject.of(model).decoder().max_length == LONGEST
    result = injected(model)
    assert any(LONGEST in np.atleast_1d(onnx.numpy_helper.to_array(one)) for one in result.graph.initializer)
    x = np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32)
    assert_law(model, result, {"x": x})


def test_a_number_whose_type_is_not_declared_and_scores_that_read_the_shape_of_queries_cancel_too():
    as_floats = "from = Cast<to = 1>(middle)\n places = Cast<to = 1>(column)\n float_away = Sub(places, from)"
    scales = SCALES.replace("away = Sub(column, middle)\n float_away = Cast<to = 1>(away)", as_floats)
    by_shape = """q_sizes = Shape(q)
     features = Gather(q_sizes, two)
     float_features = Cast<to = 1>(features)
     root = Sqrt(float_features)
     s = Div(s0, root)"""
    model = model_of(query=scales + "q = Mul(q0, up)", scores=by_shape)
    x = np.random.default_rng(5).standard_normal((2, 9, 8)).astype(np.float32)
    assert_law(model, injected(model), {"x": x})


BROKEN = {
    "keys are scaled as queries are": {"key": "k = Mul(k0, up)"},
    "queries are not scaled": {"query": SCALES + "q = Identity(q0)"},
    "values are scaled too": {"value": "v = Mul(v0, down)"},
    "the scale of keys is bounded": {"key": "lower = Max(down, edge)\n upper = Min(lower, unit)\n k = Mul(k0, upper)"},
    "keys are scaled by the length as well": {
        "key": "minus = Neg(middle)\n float_minus = Cast<to = 1>(minus)\n less = Div(float_minus, span)\n"
        " factor = Exp(less)\n both = Mul(down, factor)\n k = Mul(k0, both)"
    },
    "keys are others between two lengths": {
        "key": "after = Greater(middle, bound)\n before = Less(middle, far)\n within = And(after, before)\n"
        " other = Where(within, up, down)\n k = Mul(k0, other)"
    },
}


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN)
def test_scales_that_do_not_cancel_are_rejected(parts):
    with pytest.raises(UnsupportedError, match="depend on the total length"):
        injected(model_of(**parts))
