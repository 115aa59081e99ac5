"""Quantized models without rounding: their results, and their verification."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoders import CachedDecoder, Config, Decoder
from exports import injected
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from written import read

from kvsurgeon.parity import TOLERANCES, model_source, verifier, verify
from kvsurgeon.parity.arithmetic.float_model import float_model

SMALL = Config(layers=1, windowed=())
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # more would round again
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, feeds)[0]


WEIGHTS = (
    "<int8[4, 2] w = {-3, 5, 7, 1, 0, -9, 2, 4}, float half = {0.5}, float unit = {0.03}, uint8 zero = {128},"
    " int8 none = {0}, int8[2, 4, 1] kernel = {-3, 7, 0, 2, 5, 1, -9, 4}, int64[1] first = {0}>"
)
CASES = {
    "dynamic": ("""{
        a, s, z = DynamicQuantizeLinear(x)
        p = MatMulInteger(a, w, z)
        f = Cast<to = 1>(p)
        t = Mul(s, half)
        y = Mul(f, t)
    }"""),
    "a convolution": ("""{
        t = Transpose<perm = [1, 0]>(x)
        r = Unsqueeze(t, first)
        a, s, z = DynamicQuantizeLinear(r)
        p = ConvInteger(a, kernel, z)
        f = Cast<to = 1>(p)
        u = Mul(s, half)
        c = Mul(f, u)
        d = Squeeze(c, first)
        y = Transpose<perm = [1, 0]>(d)
    }"""),
    "before a subgraph": ("""{
        a, s, z = DynamicQuantizeLinear(x)
        p = MatMulInteger(a, w, z)
        f = Cast<to = 1>(p)
        t = Mul(s, half)
        m = Mul(f, t)
        c = Cast<to = 9>(half)
        y = If(c) <then_branch = one () => (float[3, 2] u) { u = Identity(m) },
                   else_branch = other () => (float[3, 2] v) { v = Neg(m) }>
    }"""),
    "quantized and dequantized": ("""{
        a = QuantizeLinear(x, unit, zero)
        d = DequantizeLinear(a, unit, zero)
        b = DequantizeLinear(w, half, none)
        y = MatMul(d, b)
    }"""),
    "transposed in 8 bits": ("""{
        a = QuantizeLinear(x, unit, zero)
        r = Transpose<perm = [1, 0]>(a)
        u = Transpose<perm = [1, 0]>(r)
        d = DequantizeLinear(u, unit, zero)
        b = DequantizeLinear(w, half, none)
        y = MatMul(d, b)
    }"""),
    "a single operator": ("""{
        a = QuantizeLinear(x, unit, zero)
        q = QLinearMatMul(a, unit, zero, w, half, none, half, zero)
        y = DequantizeLinear(q, half, zero)
    }"""),
}  # fmt: skip


@pytest.mark.parametrize("body", CASES.values(), ids=CASES)
def test_removes_rounding(body):
    model = read(f"case (float[3, 4] x) => (float[3, 2] y) {WEIGHTS} {body}")
    weights = np.array([-3, 5, 7, 1, 0, -9, 2, 4], np.float32).reshape(4, 2) * 0.5
    free = float_model(model)
    assert free is not None
    np.testing.assert_allclose(run(free, x=X), X @ weights, rtol=1e-5, atol=1e-5)
    assert np.abs(run(model, x=X) - X @ weights).max() > 1e-3


@pytest.mark.parametrize("read_as", ["Mul(d, s)", "Add(d, s)", "Add(d, number)"])
def test_what_depends_on_a_range_otherwise_stays(read_as):
    """A scale or a zero point that is read as a number is no rounding: it differs from call to call."""
    body = "a, s, z = DynamicQuantizeLinear(x) d = DequantizeLinear(a, s, z) number = Cast<to = 1>(z)"
    model = read(f"case (float[3, 4] x) => (float[3, 4] y) {WEIGHTS} {{ {body} y = {read_as} }}")
    np.testing.assert_allclose(run(float_model(model), x=X), run(model, x=X), atol=0.6 if "number" in read_as else 0.02)


def test_saturated_activations_stay_finite():
    body = "{ a = QuantizeLinear(x, unit, zero) y = DequantizeLinear(a, unit, zero) }"
    free = float_model(read(f"case (float[3, 4] x) => (float[3, 4] y) {WEIGHTS} {body}"))
    assert np.isfinite(run(free, x=np.full((3, 4), -np.inf, np.float32))).all()


@pytest.mark.parametrize(
    "body",
    ["{ y = QLinearSoftmax<axis = 1, opset = 13>(a, unit, zero, unit, zero) a = QuantizeLinear(x, unit, zero) }",
     "{ a = QuantizeLinear<axis = 1>(x, many, zeros) y = DequantizeLinear<axis = 1>(a, many, zeros) }",
     "{ c = Cast<to = 9>(half) a = QuantizeLinear(x, unit, zero) y = If(c) <"
     "then_branch = one () => (float[3, 4] u) { u = DequantizeLinear(a, unit, zero) }, "
     "else_branch = other () => (float[3, 4] v) { v = Neg(x) }> }"],
    ids=["an operator without a rule", "several scales", "8 bits in a subgraph"],
)  # fmt: skip
def test_returns_none_if_rounding_cannot_be_removed(body):
    more = ", float[4] many = {1.0, 1.0, 1.0, 1.0}, uint8[4] zeros = {0, 0, 0, 0}>"
    text = f"case (float[3, 4] x) => (float[3, 4] y) {WEIGHTS[:-1]}{more} {body}"
    assert float_model(read(text)) is None


class _Calibration(CalibrationDataReader):
    """Random texts."""

    def __init__(self, config: Config) -> None:
        random = np.random.default_rng(1)
        ids = (random.integers(0, config.vocabulary, (2, 12)) for _ in range(4))
        self.feeds = iter({"input_ids": one, "attention_mask": np.ones_like(one)} for one in ids)

    def get_next(self):
        return next(self.feeds, None)


class OneTooFar(CachedDecoder):
    """A decoder whose keys are wrong by less than rounding to 8 bits."""

    def weight(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        return super().weight(name, rows, columns, gain * (1.004 if "k" in name else 1.0))


def test_nothing_is_decided_if_ranges_of_a_call_move_the_reference(tmp_path, monkeypatch):
    quantized = []
    for number, form in enumerate((Decoder, CachedDecoder)):
        onnx.save(form(SMALL).model(), tmp_path / f"{number}.onnx")
        quantize_dynamic(tmp_path / f"{number}.onnx", tmp_path / f"q{number}.onnx", weight_type=QuantType.QUInt8)
        quantized.append(onnx.load(tmp_path / f"q{number}.onnx"))
    monkeypatch.setattr(model_source, "float_model", lambda model: None)
    monkeypatch.setitem(TOLERANCES, "dynamic", TOLERANCES["dynamic"].with_bound(1e-9))
    report = verify(*quantized, threads=1, effort="quick")
    assert report.verdict == "unknown"
    assert "ranges of a call alone move" in report.unverifiable


def test_finds_a_mistake_smaller_than_rounding(tmp_path):
    plain, right, wrong = (form(SMALL).model() for form in (Decoder, CachedDecoder, OneTooFar))
    quantized = []
    for number, model in enumerate((plain, right, wrong)):
        onnx.save(model, tmp_path / f"{number}.onnx")
        quantize_dynamic(tmp_path / f"{number}.onnx", tmp_path / f"q{number}.onnx", weight_type=QuantType.QUInt8)
        quantized.append(onnx.load(tmp_path / f"q{number}.onnx"))
    report = verify(quantized[0], quantized[1], threads=1)
    assert (report.verdict, report.arithmetic) == ("same", "dynamic")
    assert report.error < 1e-4
    assert "without rounding to 8 bits" in report.notes[-1]
    report = verify(quantized[0], quantized[2], threads=1)
    assert report.verdict == "different"
    assert report.error < 0.35  # the error of rounding in one layer


def test_a_text_that_is_not_compared_with_rounding_is_no_fault(tmp_path, monkeypatch):
    onnx.save(Decoder(SMALL).model(), tmp_path / "plain.onnx")
    quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "quantized.onnx", weight_type=QuantType.QUInt8)
    compare_all = verifier._Verification.compare_all

    def far_apart(work, models, optimization):
        report, reference = compare_all(work, models, optimization)
        if optimization == "all":
            first, second, *others = report.comparisons
            first = replace(first, verdict="different", error=0.9)
            others = (first, replace(second, verdict="unknown", error=None), *others)
            report = replace(report, comparisons=others)
        return report, reference

    monkeypatch.setattr(verifier._Verification, "compare_all", far_apart)
    quantized = onnx.load(tmp_path / "quantized.onnx")
    report = verify(quantized, injected(quantized), threads=1, effort="quick")
    assert report.verdict == "same"
    assert "logits differ by 0.9 of their spread" in report.notes[-1]


def test_verifies_static_quantization_without_rounding(tmp_path):
    onnx.save(Decoder(SMALL).model(), tmp_path / "plain.onnx")
    quantize_static(tmp_path / "plain.onnx", tmp_path / "q.onnx", _Calibration(SMALL), quant_format=QuantFormat.QDQ)
    model = onnx.load(tmp_path / "q.onnx")
    report = verify(model, injected(model), threads=1)
    assert (report.verdict, report.arithmetic) == ("same", "quantized")
    assert 0 < report.error < 1e-4  # an 8-bit number is equal, or differs by more
