"""Outputs other than plain logits are compared: integers, probabilities, masked vocabularies, columns of NaN."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from decoders import CachedDecoder, Config, Decoder
from onnx import TensorProto, helper, numpy_helper

from kvsurgeon.parity import verify

CONFIG = Config(layers=2)
VOCABULARY = CONFIG.vocabulary
FIFTH = (np.arange(VOCABULARY) % 5 == 0).astype(np.float32)


def masked_by(value):
    """Return the nodes that add a value to a fifth of the logits."""
    with np.errstate(invalid="ignore"):
        added = np.where(FIFTH, np.float32(value), np.float32(0))
    return [helper.make_node("Add", ["raw", "constant"], ["result"])], {"constant": added}


OUTPUTS = {
    "probabilities": ([helper.make_node("Softmax", ["raw"], ["result"], axis=-1)], {}),
    "a fifth masked by -1e4": masked_by(-1e4),
    "a fifth masked by -1e9": masked_by(-1e9),
    "a fifth masked by minus infinity": masked_by(-np.inf),
    "a column of NaN": masked_by(0) and (
        [helper.make_node("Add", ["raw", "constant"], ["result"])],
        {"constant": np.where(np.arange(VOCABULARY) == 3, np.float32(np.nan), np.float32(0))},
    ),
    "flat logits": (
        [helper.make_node("Reshape", ["raw", "constant"], ["result"])], {"constant": np.array([-1, VOCABULARY])}
    ),
    "tokens last": ([helper.make_node("Transpose", ["raw"], ["result"], perm=[0, 2, 1])], {}),
    "argmax": ([helper.make_node("ArgMax", ["raw"], ["result"], axis=-1, keepdims=0)], {}),
}  # fmt: skip
INTEGERS = {"argmax"}


def with_output(model: onnx.ModelProto, name: str, *, factor: float = 1.0) -> onnx.ModelProto:
    """Return the model with an output made of its logits, which a factor makes wrong after a past."""
    nodes, constants = OUTPUTS[name]
    graph = model.graph
    next(node for node in graph.node if "logits" in node.output).output[:] = ["plain"]
    cached = any(one.name.startswith("past_key_values") for one in graph.input)
    more = []
    if cached and factor != 1.0:
        constants = constants | {"axis": np.int64(2), "none": np.int64(0), "factor": np.float32(factor)}
        more = [
            helper.make_node("Shape", ["past_key_values.0.key"], ["past_shape"]),
            helper.make_node("Gather", ["past_shape", "axis"], ["past_rows"]),
            helper.make_node("Greater", ["past_rows", "none"], ["has_past"]),
            helper.make_node("Mul", ["plain", "factor"], ["scaled"]),
            helper.make_node("Where", ["has_past", "scaled", "plain"], ["raw"]),
        ]
    else:
        more = [helper.make_node("Identity", ["plain"], ["raw"])]
    graph.node.extend([*more, *nodes])
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items())
    place = next(place for place, one in enumerate(graph.output) if one.name == "logits")
    dtype = TensorProto.INT64 if name in INTEGERS else TensorProto.FLOAT
    rank = 2 if name in ("argmax", "flat logits") else 3
    names: list[str | None] = [None] * rank
    if name == "tokens last":  # found by its name
        names = [graph.output[place].type.tensor_type.shape.dim[axis].dim_param or None for axis in (0, 2, 1)]
    graph.output[place].CopyFrom(helper.make_tensor_value_info("result", dtype, names))
    return model


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_right_cache_is_accepted(name):
    report = verify(
        with_output(Decoder(CONFIG).model(), name), with_output(CachedDecoder(CONFIG).model(), name), threads=1
    )

    assert (report.verdict, report.problems) == ("same", ())


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_wrong_cache_is_noticed(name):
    factor = -1.0 if name in INTEGERS else 1.001
    wrong = with_output(CachedDecoder(CONFIG).model(), name, factor=factor)
    report = verify(with_output(Decoder(CONFIG).model(), name), wrong, threads=1, explain=False)

    assert report.verdict == "different"
    assert {one.verdict for one in report.comparisons if len(one.chunks) == 1} <= {"same"}


def test_the_run_can_be_repeated_by_its_seed():
    pair = (
        with_output(Decoder(CONFIG).model(), "argmax"),
        with_output(CachedDecoder(CONFIG).model(), "argmax", factor=-1.0),
    )
    first = verify(*pair, threads=1, explain=False, effort="quick")
    again = verify(*pair, threads=1, explain=False, effort="quick", seed=first.seed)

    assert first.comparisons == again.comparisons
    assert first.seed != verify(*pair, threads=1, explain=False, effort="quick").seed


def test_a_model_that_takes_a_few_tokens_only_cannot_be_verified():
    class TakesTwo(Decoder):
        def query_index(self):
            two = self.graph.op("Min", self.new_length(), self.graph.constant(2))
            return self.range(0, two)

    report = verify(TakesTwo(CONFIG).model(), CachedDecoder(CONFIG).model(), threads=1)

    assert report.verdict == "unknown"
    assert "takes texts of up to 2 tokens only" in report.problems[0]
