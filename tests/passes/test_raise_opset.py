"""A later opset says the same; what it cannot say is refused. Masks within half precision hide as before."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attentions import attention
from exports import ONE_OF_EACH, export
from laws import ALLOWED, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.float16_mask_range import float16_mask_range
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.workflow.pipeline import Pipeline


def raised(model: onnx.ModelProto, opset: int = 24) -> onnx.ModelProto:
    subject = Subject.of(model)
    assert isinstance(RaiseOpset(opset=opset).apply(subject), Changed)
    result = io.to_proto(subject.model)
    onnx.checker.check_model(result, full_check=True)
    assert {entry.domain: entry.version for entry in result.opset_import}[""] == opset
    return result


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_what_is_raised_computes_the_same(name):
    model, feeds = export(name), texts(export(name))
    expected, found = (in_onnxruntime(one)(feeds)["logits"] for one in (model, raised(model)))
    assert difference(found, expected) == 0


def test_what_was_an_attribute_and_is_an_input_moves():
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
        ("y = Softmax(x)", 11, "cannot be raised"),
    ],
)
def test_what_would_mean_something_else_is_refused(text, opset, reason):
    model = read(f"case (float[b, 4, 8] x) => (float[b, 4, 8] y) <float[2] w> {{ {text} }}", opset)
    subject = Subject.of(model)
    before = io.to_proto(subject.model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match=reason):
        RaiseOpset().apply(subject)
    assert io.to_proto(subject.model).SerializeToString(deterministic=True) == before


def test_a_later_opset_is_left():
    assert isinstance(RaiseOpset(opset=18).apply(Subject.of(read(attention(), opset=20))), Unchanged)


LOWEST = float(np.finfo(np.float32).min)


@pytest.mark.parametrize(
    "text",
    [
        attention().replace("-10000.0", str(LOWEST)),
        attention(masked="gone = Not(allowed)\n  g = Cast<to = 1>(gone)\n  far = Mul(g, low)\n"
                  "  masked_scores = Add(s, far)").replace("-10000.0", str(LOWEST)),
    ],
    ids=["chosen", "added"],
)  # fmt: skip
def test_tokens_are_hidden_by_what_half_precision_has(text):
    model = read(text)
    result = io.to_proto(Pipeline((float16_mask_range,)).run(model).model)
    numbers = [onnx.numpy_helper.to_array(tensor) for tensor in result.graph.initializer]
    assert min(float(array.min()) for array in numbers) >= -10_000
    feeds = texts(model)
    expected, found = (in_onnxruntime(one)(feeds)["logits"] for one in (model, result))
    assert difference(found, expected) <= ALLOWED["float32"]


def test_a_bound_that_hides_nothing_stays():
    model = read(f"case (float[b, 4] x) => (float[b, 4] y) <float low = {{{LOWEST}}}> {{ y = Clip(x, low) }}")
    outcome = Pipeline((float16_mask_range,)).run(model)
    assert not outcome.changed


def test_bfloat16_has_the_range_of_float32():
    model = read(
        "case (bool[b, 4] seen, bfloat16[b, 4] s, bfloat16 low) => (bfloat16[b, 4] y) { y = Where(seen, s, low) }"
    )
    lowest = onnx.helper.make_tensor("low", onnx.TensorProto.BFLOAT16, [], [LOWEST])
    model.graph.initializer.append(lowest)
    del model.graph.input[2]
    assert not Pipeline((float16_mask_range,)).run(model).changed
