"""Rounding of the reference sets what may differ: bounds of floating-point outputs, and integers at near ties."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from exports import injected
from further_outputs import NAME, OUTPUTS, with_output
from onnx import TensorProto, helper, numpy_helper

from kvsurgeon.parity import TOLERANCES, verify
from kvsurgeon.parity.arithmetic.rounding import with_random_rounding
from kvsurgeon.runtime import UncachedDecoder, open_session

CONFIG = Config(layers=2)
COMPARED = [
    name for place, name in enumerate(OUTPUTS)
    if OUTPUTS[name].rows is not None and (place % 4 == 0 or name in ("positions_from_end", "scores", "last_hidden"))
]  # fmt: skip


def distance_by_rounding(dtype: str, times: float) -> float:
    model = Decoder(Config(dtype=dtype)).model()
    rounded = with_random_rounding(model, times)
    decoders = [UncachedDecoder(open_session(one, name="a model")) for one in (model, rounded)]
    tokens = np.arange(20)[None]
    logits = [one.run(one.inputs.feeds(tokens, np.ones_like(tokens)))["logits"] for one in decoders]
    return float(np.abs(logits[0].astype(np.float64) - logits[1]).max())


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_random_rounding_is_as_large_as_the_type_says(dtype):
    unit = np.finfo(dtype).eps
    assert unit / 10 < distance_by_rounding(dtype, 1.0) < 1000 * unit
    assert distance_by_rounding(dtype, 1000.0) > 20 * distance_by_rounding(dtype, 1.0)


def test_a_model_without_weights_cannot_be_rounded():
    graph = "g (float[N] x) => (float[N] y) { y = Neg(x) }"
    assert with_random_rounding(onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + graph), 1) is None


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.01, "different")])
def test_the_bound_of_float16_follows_its_noise(factor, verdict):
    config = Config(layers=1, dtype="float16", windowed=())
    candidate = CachedDecoder(config).model()
    maker = next(node for node in candidate.graph.node if "logits" in node.output)
    maker.output[:] = ["exact"]
    candidate.graph.initializer.append(numpy_helper.from_array(np.float16(factor), "factor"))
    candidate.graph.node.append(helper.make_node("Mul", ["exact", "factor"], ["logits"]))
    report = verify(Decoder(config).model(), candidate, threads=1, explain=False)

    assert report.verdict == verdict
    assert report.bound < TOLERANCES["float16"].bound


def with_choice(model: onnx.ModelProto, *, negated: bool = False) -> onnx.ModelProto:
    """Return the model with the index of the largest logit instead of logits, which rounding often changes."""
    graph = model.graph
    next(node for node in graph.node if "logits" in node.output).output[:] = ["raw"]
    for name, value in (("often", 1e6), ("by", 1e-6), ("sign", -1.0 if negated else 1.0)):
        graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    graph.node.extend(
        [
            helper.make_node("Mul", ["raw", "sign"], ["signed"]),
            helper.make_node("Mul", ["signed", "often"], ["scaled"]),
            helper.make_node("Sin", ["scaled"], ["wave"]),
            helper.make_node("Mul", ["wave", "by"], ["off"]),
            helper.make_node("Add", ["signed", "off"], ["near"]),
            helper.make_node("Concat", ["signed", "near"], ["pairs"], axis=-1),  # two almost equal logits of each token
            helper.make_node("ArgMax", ["pairs"], ["logits"], axis=-1, keepdims=0),
        ]
    )
    output = next(one for one in graph.output if one.name == "logits")
    output.CopyFrom(helper.make_tensor_value_info("logits", TensorProto.INT64, [None, None]))
    return model


def test_integers_may_differ_if_rounding_changes_the_reference():
    reference = with_choice(Decoder(CONFIG).model())
    report = verify(reference, with_choice(CachedDecoder(CONFIG).model()), threads=1)
    assert (report.verdict, report.problems) == ("same", ())


def test_other_integers_may_not():
    reference = with_choice(Decoder(CONFIG).model())
    wrong = with_choice(CachedDecoder(CONFIG).model(), negated=True)
    assert verify(reference, wrong, threads=1, explain=False).verdict == "different"


def changed_after_a_past(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with another value of its further output in calls with a past."""
    graph = model.graph
    output = next(one for one in graph.output if one.name == NAME)
    maker = next(node for node in graph.node if NAME in node.output)
    maker.output[list(maker.output).index(NAME)] = "plain"
    for node in graph.node:
        node.input[:] = ["plain" if name == NAME else name for name in node.input]
    onnx_type = output.type.tensor_type.elem_type
    flips = onnx_type == TensorProto.BOOL
    constants = {"rows": np.int64(2), "none": np.int64(0), "by": np.float32(0.1 if onnx_type in (1, 10) else 1)}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items())
    graph.node.extend(
        [
            helper.make_node("Shape", ["past_key_values.0.key"], ["sizes"]),
            helper.make_node("Gather", ["sizes", "rows"], ["past"]),
            helper.make_node("Greater", ["past", "none"], ["has_past"]),
            helper.make_node("Cast", ["plain"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Sub" if flips else "Add", ["by", "float"], ["changed"]),
            helper.make_node("Where", ["has_past", "changed", "float"], ["chosen"]),
            helper.make_node("Cast", ["chosen"], [NAME], to=onnx_type),
        ]
    )
    return model


@pytest.mark.parametrize("name", COMPARED)
def test_a_further_output_is_compared_with_that_of_the_text_so_far(name):
    reference = with_output(name)
    candidate = injected(reference)

    report = verify(reference, candidate, threads=1)
    assert (report.verdict, report.problems) == ("same", ())
    assert verify(reference, changed_after_a_past(candidate), threads=1, explain=False).verdict == "different"
