"""raise-opset converts operators to a later opset, and rejects those that have another meaning there."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attentions import attention
from exports import ONE_OF_EACH, export
from laws import difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.opset.raise_opset import RaiseOpset


def raised(model: onnx.ModelProto, opset: int = 24) -> onnx.ModelProto:
    subject = Subject.of(model)
    assert isinstance(RaiseOpset(opset=opset).apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result, full_check=True)
    assert {entry.domain: entry.version for entry in result.opset_import}[""] == opset
    return result


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_raised_exports_give_bitwise_equal_results(name):
    model, feeds = export(name), texts(export(name))
    expected, found = (in_onnxruntime(one)(feeds)["logits"] for one in (model, raised(model)))
    assert difference(found, expected) == 0


def test_attributes_that_became_inputs_are_converted():
    text = """case (float[b, n, 8] x) => (float[b, n, 1] a, float[b, n, 4] c, float[b, n, 4] d)
    {
      a = ReduceMean<axes = [2]>(x)
      c, d = Split<axis = 2>(x)
    }"""
    result = raised(read(text, opset=17))
    mean, split = result.graph.node
    assert (len(mean.input), [a.name for a in mean.attribute]) == (2, [])
    assert {a.name: a.i for a in split.attribute} == {"axis": 2, "num_outputs": 2}
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)
    expected, found = (in_onnxruntime(one)({"x": x}) for one in (read(text, opset=17), result))
    assert all((expected[name] == found[name]).all() for name in expected)


@pytest.mark.parametrize(
    ("text", "opset", "reason"),
    [
        ("y = GroupNormalization<num_groups = 2>(x, w, w)", 18, "GroupNormalization of opset 18"),
        ("y = DFT(x)", 17, "DFT of opset 17"),  # along axis 1; in opset 20 along the last but one
        ("y = Softmax(x)", 11, "cannot be raised"),
    ],
)
def test_operators_with_another_meaning_are_rejected(text, opset, reason):
    model = read(f"case (float[b, 4, 8] x) => (float[b, 4, 8] y) <float[2] w> {{ {text} }}", opset)
    subject = Subject.of(model)
    before = io.to_proto(subject.model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match=reason):
        RaiseOpset().apply(subject)
    assert io.to_proto(subject.model).SerializeToString(deterministic=True) == before


def test_a_later_opset_is_unchanged():
    assert isinstance(RaiseOpset(opset=18).apply(Subject.of(read(attention(), opset=20))), Unchanged)
