"""Models in 16 bits in float32: their results, and their verification."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoders import CachedDecoder, Config, Decoder, in_bfloat16
from onnx import TensorProto, helper
from written import read

from kvsurgeon.parity import verifier, verify
from kvsurgeon.parity.arithmetic.wide_model import wide_model

# The parser takes float16 as integers of the same bits: 15360 is 1, 16384 is 2, 16896 is 3, 14336 is a half.
SMALL = Config(layers=1, windowed=())
HALF = Config(layers=1, windowed=(), dtype="float16")


class OneTooFar(CachedDecoder):
    """A decoder whose keys are wrong by less than rounding to 16 bits may be."""

    def weight(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        return super().weight(name, rows, columns, gain * (1.02 if "k" in name else 1.0))


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Round the logits of a model in bfloat16 to 8 bits."""
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "exact"
    model.graph.initializer.append(helper.make_tensor("step", TensorProto.FLOAT, [], [2.0**-3]))
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.INT8, [], [0]))
    model.graph.node.extend(
        [
            helper.make_node("Cast", ["exact"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("QuantizeLinear", ["float", "step", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["rounded"]),
            helper.make_node("Cast", ["rounded"], ["logits"], to=TensorProto.BFLOAT16),
        ]
    )
    return model


def test_a_wide_model_computes_in_float32():
    model = read("""case (float16[3] x) => (float16[3] y) <float16[3] w = {15360, 16384, 16896}, bool yes = {1}>
    {
        one = Constant<value = float16[1] {14336}>()
        a = Mul(x, w)
        b = If(yes) <
            then_branch = g () => (float16[3] c) { d = Cast<to = 10>(a) c = Add(d, one) },
            else_branch = h () => (float16[3] c) { c = Identity(a) }
        >
        y = Identity(b)
    }""")
    wide = wide_model(model)
    assert wide is not None
    x = np.array([1 + 2.0**-20, 1.0, 1.0], np.float32)
    (y,) = ort.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_array_equal(y, x * np.array([1, 2, 3], np.float32) + np.float32(0.5))


def test_a_weight_that_an_input_may_replace_is_not_widened():
    model = read("case (float16[3] x) => (float16[3] y) <float16[3] w = {15360, 16384, 16896}> { y = Mul(x, w) }")
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT16, [3]))
    assert wide_model(model) is None


@pytest.mark.parametrize(("form", "verdict"), [(CachedDecoder, "same"), (OneTooFar, "different")])
def test_verifies_bfloat16_in_float32(form, verdict):
    report = verify(in_bfloat16(Decoder(SMALL).model()), in_bfloat16(form(SMALL).model()), threads=1, effort="quick")
    assert (report.verdict, report.arithmetic) == (verdict, "bfloat16")
    assert "verified in float32" in report.notes[-1]


@pytest.mark.parametrize(("form", "verdict"), [(CachedDecoder, "same"), (OneTooFar, "different")])
def test_verifies_bfloat16_without_rounding_to_8_bits(form, verdict):
    models = [rounded(in_bfloat16(one(SMALL).model())) for one in (Decoder, form)]
    report = verify(*models, threads=1, effort="quick")
    assert (report.arithmetic, report.verdict) == ("quantized", verdict)
    found = "; with it: onnxruntime cannot run the reference model" if verdict == "same" else ""
    assert any(f"verified without rounding to 8 bits{found}" in note for note in report.notes)


@pytest.mark.parametrize(
    ("form", "agreement", "verdict"),
    [(CachedDecoder, 0.9, "same"), (OneTooFar, 0.9, "different"), (CachedDecoder, 0.1, "different")],
)
def test_models_that_differ_by_rounding_are_compared_in_float32(monkeypatch, form, agreement, verdict):
    compare_all = verifier._Verification.compare_all

    def with_another_expert(work, models, optimization):
        report, reference = compare_all(work, models, optimization)
        if report.arithmetic == "float16":
            first = replace(report.comparisons[0], verdict="different", error=0.5, agreement=agreement)
            report = replace(report, comparisons=(first,))
        return report, reference

    monkeypatch.setattr(verifier._Verification, "compare_all", with_another_expert)
    report = verify(Decoder(HALF).model(), form(HALF).model(), threads=1, effort="quick")
    assert report.verdict == verdict
    assert any("in float16: outputs differ by 0.5 of" in note for note in report.notes) == (agreement == 0.9)
