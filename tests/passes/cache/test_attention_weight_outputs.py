"""Attention weights as outputs: whatever the cache, they are those of past and new tokens."""

from __future__ import annotations

import onnx
import pytest
from decoders import Config, Decoder
from exports import injected
from onnx import helper

from kvsurgeon import io
from kvsurgeon.parity import verify
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.shapes.fix_shapes import FixShapes
from kvsurgeon.workflow.verification import verify_models

FORMS = {
    "dynamic": {},
    "static": {"cache": "static"},
    "static, fixed": {"cache": "static", "max_length": 24},
    "static, copied rows": {"cache": "static", "past_length": "mask"},
    "new tokens": {"cache": "new-tokens"},
    "new tokens, unfilled rows": {"cache": "new-tokens", "past_length": "input"},
}
CONFIG = Config()


def with_weight_outputs() -> onnx.ModelProto:
    """A decoder with an output `[batch, heads, length, length]` for each layer."""
    model = Decoder(CONFIG).model()
    for node in [node for node in model.graph.node if node.op_type == "Softmax"]:
        dims = ["batch", CONFIG.heads, "length", "length"]
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, dims))
    assert len(model.graph.output) == 1 + CONFIG.layers
    return model


def fixed(model: onnx.ModelProto, tokens: int) -> onnx.ModelProto:
    subject = Subject.of(model)
    assert isinstance(FixShapes(tokens=tokens, max_length=24).apply(subject), Changed)
    return io.to_proto(subject.model)


def with_heavier(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """The model, with one output a tenth larger than it was, and nothing else changed."""
    broken = onnx.ModelProto.FromString(model.SerializeToString())
    node = next(node for node in broken.graph.node if output in node.output)
    readers = [reader for reader in broken.graph.node if output in reader.input]
    for each in (node.output, *(reader.input for reader in readers)):
        each[:] = [f"{name}.own" if name == output else name for name in each]
    factor = helper.make_tensor("a_tenth_more", onnx.TensorProto.FLOAT, (), [1.1])
    broken.graph.initializer.append(factor)
    broken.graph.node.append(helper.make_node("Mul", [f"{output}.own", factor.name], [output]))
    return broken


@pytest.mark.parametrize("form", FORMS)
def test_they_are_compared_in_every_cache_mode(form):
    original = with_weight_outputs()
    model = injected(original, **FORMS[form])

    report = verify(original, model, threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    last = original.graph.output[-1].name
    broken = verify(original, with_heavier(model, last), threads=1, explain=False)
    assert broken.verdict == "different"
    assert all(f"`{last}`" in problem for problem in broken.problems)


@pytest.mark.parametrize("form", ["static", "static, fixed", "new tokens, unfilled rows"])
@pytest.mark.parametrize("tokens", [1, CONFIG.heads])
def test_they_are_compared_with_fixed_shapes(form, tokens):
    original = with_weight_outputs()
    model = fixed(injected(original, **FORMS[form]), tokens)

    report = verify(original, model, threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    last = original.graph.output[-1].name
    assert verify(original, with_heavier(model, last), threads=1, explain=False).verdict == "different"


@pytest.mark.parametrize("form", FORMS)
def test_two_models_with_a_cache_are_compared(form):
    original = with_weight_outputs()
    before, after = injected(original), injected(original, **FORMS[form])
    last = original.graph.output[-1].name

    assert verify_models(before, after).verdict == "same"
    broken = verify_models(before, with_heavier(after, last))
    assert broken.verdict == "different"
    assert all(f"`{last}`" in problem for problem in broken.problems)


def test_the_bound_follows_the_rounding_of_the_output_that_differs():
    # With this seed, weights differ by 1.6e-5 of their spread: rounding, though that of the logits is a tenth of it.
    original = with_weight_outputs()
    before, after = injected(original), injected(original, **FORMS["new tokens, unfilled rows"])
    assert verify_models(before, after, seed=79, threads=1).verdict == "same"
