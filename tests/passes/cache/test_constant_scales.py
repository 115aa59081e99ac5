"""`GroupQueryAttention` with a cache of integers computes what the model with rounded keys and values computes."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError, UsageError
from kvsurgeon.fusion.quantized_operators import scales_of
from kvsurgeon.parity import verify
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.workflow.pipeline import Pipeline

FUSED = "inject{cache=static},fuse-attention"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.txt"
    path.write_text(", ".join(map(str, np.random.default_rng(0).integers(0, 61, 400))))
    return path


class Convolved(Decoder):
    """Keys are projections of the results of a causal convolution."""

    def heads(self, hidden: str, name: str, count: int, gain: float = 1.0) -> str:
        graph, size = self.graph, self.config.hidden
        if name == "key":
            kernel = graph.constant(np.random.default_rng(1).standard_normal((size, 1, 3)), "float32")
            turned = graph.op("Transpose", hidden, perm=[0, 2, 1])
            hidden = graph.op("Conv", turned, kernel, group=size, kernel_shape=[3], pads=[2, 0])
            hidden = graph.op("Transpose", hidden, perm=[0, 2, 1])
        return super().heads(hidden, name, count, gain)


@functools.cache
def original() -> onnx.ModelProto:
    return Decoder(Config(layers=2, head_dim=16)).model()


def outcome(passes: str, text: Path | None, model: onnx.ModelProto | None = None) -> Changed:
    subject = Subject.of(original() if model is None else model)
    subject.text = text
    return Pipeline.parse(passes).run(subject).changes[-1]


def models(changed: Changed) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return the model with rounded keys and values, and that with a cache of integers."""
    assert changed.equal_models is not None
    ((rounded, result),) = changed.equal_models()
    return io.to_proto(rounded), io.to_proto(result)


@pytest.mark.parametrize(
    ("fused", "bits", "scales"),
    [(FUSED, 8, "per-channel"), (FUSED, 4, "per-channel"), ("inject,fuse-attention", 8, "per-tensor")],
)
def test_results_are_those_of_rounded_keys_and_values(fused, bits, scales, text):
    changed = outcome(f"{fused},quantize-cache{{bits={bits},scales={scales}}}", text)
    report = verify(*models(changed), effort="quick", seed=3)
    assert report.verdict == "same", report.problems
    assert report.error < 2e-2
    before, after = changed.cache_bytes or (0, 0)
    assert before == after * 32 // bits


def test_states_stay_floats(text):
    model = Convolved(Config(layers=2, head_dim=16, attention_mask=False)).model()
    rounded, result = models(outcome("inject,fuse-attention,quantize-cache{scales=per-channel}", text, model))
    types = {value.name: value.type.tensor_type.elem_type for value in result.graph.input}
    assert types["past_key_values.0.key"] == onnx.TensorProto.INT8
    assert types["past_key_values.0.conv_state"] == onnx.TensorProto.FLOAT
    assert verify(rounded, result, effort="quick", seed=3).verdict == "same"


def test_scales_of_another_layer_are_found(text):
    rounded, wrong = models(outcome(f"{FUSED},quantize-cache{{scales=per-tensor}}", text))
    first, second = (node for node in wrong.graph.node if node.op_type == "GroupQueryAttention")
    first.input[12] = second.input[13]
    assert verify(rounded, wrong, effort="quick", seed=3).verdict == "different"


def test_the_largest_number_becomes_the_largest_integer():
    assert np.allclose([127, -63.5] / scales_of(np.array([127, 63.5]), 8), [127, -127])
    assert np.isfinite(0 / scales_of(np.zeros(1), 4)).all()


def test_rejects_a_cache_that_no_operator_updates(text):
    with pytest.raises(UnsupportedError, match="constant scales need an operator that takes them"):
        outcome("inject,quantize-cache{scales=per-channel}", text)


@pytest.mark.parametrize(("options", "found"), [("", "none"), (",hadamard=true", "hadamard=true")])
def test_needs_a_text_and_no_rotation(options, found, text):
    with pytest.raises(UsageError, match=f"expected a text for scales=per-channel, and no rotation, found {found}"):
        outcome(f"{FUSED},quantize-cache{{scales=per-channel{options}}}", text if options else None)
