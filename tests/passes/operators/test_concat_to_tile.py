"""concat-to-tile replaces a Concat that repeats its input, and no other Concat."""

from __future__ import annotations

import numpy as np
import pytest
from exports import ONE_OF_EACH, export
from laws import in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.concat_to_tile import ConcatToTile

TEXT = "case (float[batch, n, 4] x) => (float[batch, n, m] y) {{ a = Neg(x) b = Sin(x) {concat} }}"


@pytest.mark.parametrize("concat", ["y = Concat<axis = -1>(a, a)", "y = Concat<axis = 1>(a, a, a)"])
def test_a_concat_that_repeats_its_input_becomes_a_tile(concat):
    model = read(TEXT.format(concat=concat), 17)
    subject = Subject.of(model)
    assert isinstance(ConcatToTile().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert [(node.op_type, node.output[0]) for node in result.graph.node] == [("Neg", "a"), ("Tile", "y")]
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)}
    expected, found = (in_onnxruntime(one)(feeds)["y"] for one in (model, result))
    np.testing.assert_array_equal(found, expected)
    assert isinstance(ConcatToTile().apply(subject), Unchanged)


@pytest.mark.parametrize(
    "concat",
    ["y = Concat<axis = -1>(a, b)", "y = Concat<axis = -1>(a, b, a)", "y = Concat<axis = -1>(a)",
     "s = Shape(x) t = Concat<axis = 0>(s, s) u = Cast<to = 1>(t) y = Expand(u, s)"],
)  # fmt: skip
def test_other_concats_are_unchanged(concat):
    assert isinstance(ConcatToTile().apply(Subject.of(read(TEXT.format(concat=concat), 17))), Unchanged)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_exports_give_bitwise_equal_results(name):
    model, feeds = export(name), texts(export(name))
    subject = Subject.of(model)
    ConcatToTile().apply(subject)
    expected, found = (in_onnxruntime(one)(feeds)["logits"] for one in (model, io.to_proto(subject.model)))
    np.testing.assert_array_equal(found, expected)
