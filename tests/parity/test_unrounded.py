"""Models that round to 8 bits, with nothing rounded: what they compute then, and that the judge holds them to it."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from decoders import CachedDecoder, Config, Decoder
from exports import injected
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from written import read

from kvsurgeon.parity import verify
from kvsurgeon.parity.float_model import unrounded

SMALL = Config(layers=1, windowed=())
X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC  # more would round again
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]).run(None, feeds)[0]


WEIGHTS = (
    "<int8[4, 2] w = {-3, 5, 7, 1, 0, -9, 2, 4}, float half = {0.5}, float unit = {0.03}, uint8 zero = {128},"
    " int8 none = {0}>"
)
CASES = {
    "dynamic": ("""{
        a, s, z = DynamicQuantizeLinear(x)
        p = MatMulInteger(a, w, z)
        f = Cast<to = 1>(p)
        t = Mul(s, half)
        y = Mul(f, t)
    }"""),
    "quantised and restored": ("""{
        a = QuantizeLinear(x, unit, zero)
        d = DequantizeLinear(a, unit, zero)
        b = DequantizeLinear(w, half, none)
        y = MatMul(d, b)
    }"""),
    "moved while it has 8 bits": ("""{
        a = QuantizeLinear(x, unit, zero)
        r = Transpose<perm = [1, 0]>(a)
        u = Transpose<perm = [1, 0]>(r)
        d = DequantizeLinear(u, unit, zero)
        b = DequantizeLinear(w, half, none)
        y = MatMul(d, b)
    }"""),
    "one operator": ("""{
        a = QuantizeLinear(x, unit, zero)
        q = QLinearMatMul(a, unit, zero, w, half, none, half, zero)
        y = DequantizeLinear(q, half, zero)
    }"""),
}  # fmt: skip


@pytest.mark.parametrize("body", CASES.values(), ids=CASES)
def test_nothing_is_rounded(body):
    model = read(f"case (float[3, 4] x) => (float[3, 2] y) {WEIGHTS} {body}")
    weights = np.array([-3, 5, 7, 1, 0, -9, 2, 4], np.float32).reshape(4, 2) * 0.5
    free = unrounded(model)
    assert free is not None
    np.testing.assert_allclose(run(free, x=X), X @ weights, rtol=1e-5, atol=1e-5)
    assert np.abs(run(model, x=X) - X @ weights).max() > 1e-3


def test_what_8_bits_saturate_at_stays_a_number():
    body = "{ a = QuantizeLinear(x, unit, zero) y = DequantizeLinear(a, unit, zero) }"
    free = unrounded(read(f"case (float[3, 4] x) => (float[3, 4] y) {WEIGHTS} {body}"))
    assert np.isfinite(run(free, x=np.full((3, 4), -np.inf, np.float32))).all()


@pytest.mark.parametrize(
    "body",
    ["{ y = QLinearSoftmax<axis = 1, opset = 13>(a, unit, zero, unit, zero) a = QuantizeLinear(x, unit, zero) }",
     "{ a = QuantizeLinear<axis = 1>(x, many, zeros) y = DequantizeLinear<axis = 1>(a, many, zeros) }"],
    ids=["an operator without a rule", "several scales"],
)  # fmt: skip
def test_what_cannot_be_left_out_is_left_alone(body):
    more = ", float[4] many = {1.0, 1.0, 1.0, 1.0}, uint8[4] zeros = {0, 0, 0, 0}>"
    text = f"case (float[3, 4] x) => (float[3, 4] y) {WEIGHTS[:-1]}{more} {body}"
    assert unrounded(read(text)) is None


class _Readings(CalibrationDataReader):
    """Texts of all tokens, for a decoder with and without a cache alike."""

    def __init__(self, config: Config) -> None:
        random = np.random.default_rng(1)
        ids = (random.integers(0, config.vocabulary, (2, 12)) for _ in range(4))
        self.feeds = iter({"input_ids": one, "attention_mask": np.ones_like(one)} for one in ids)

    def get_next(self):
        return next(self.feeds, None)


class OneTooFar(CachedDecoder):
    """Its keys are off by less than 8 bits show."""

    def weight(self, name: str, rows: int, columns: int, gain: float = 1.0) -> str:
        return super().weight(name, rows, columns, gain * (1.004 if "k" in name else 1.0))


def test_a_mistake_smaller_than_rounding_is_seen(tmp_path):
    plain, right, wrong = (form(SMALL).model() for form in (Decoder, CachedDecoder, OneTooFar))
    quantised = []
    for number, model in enumerate((plain, right, wrong)):
        onnx.save(model, tmp_path / f"{number}.onnx")
        quantize_dynamic(tmp_path / f"{number}.onnx", tmp_path / f"q{number}.onnx", weight_type=QuantType.QUInt8)
        quantised.append(onnx.load(tmp_path / f"q{number}.onnx"))
    report = verify(quantised[0], quantised[1], threads=1)
    assert (report.verdict, report.arithmetic) == ("same", "dynamic")
    assert report.error < 1e-4
    assert "nothing rounded to 8 bits" in report.notes[-1]
    report = verify(quantised[0], quantised[2], threads=1)
    assert report.verdict == "different"
    assert report.error < 0.35  # what rounding may do to one layer


def test_static_quantisation_is_judged_without_rounding(tmp_path):
    onnx.save(Decoder(SMALL).model(), tmp_path / "plain.onnx")
    quantize_static(tmp_path / "plain.onnx", tmp_path / "q.onnx", _Readings(SMALL), quant_format=QuantFormat.QDQ)
    model = onnx.load(tmp_path / "q.onnx")
    report = verify(model, injected(model), threads=1)
    assert (report.verdict, report.arithmetic) == ("same", "quantised")
    assert 0 < report.error < 1e-4  # a number of 8 bits is the same or is off by more
