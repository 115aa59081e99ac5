"""Heads of quantised weights: what is stored is gathered as it is stored, whichever way onnxruntime quantised it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from laws import difference, in_onnxruntime, texts
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer
from written import read

from kvsurgeon import io
from kvsurgeon.errors import Refused
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.expand_gqa import ExpandGqa
from kvsurgeon.passes.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.replicate_kv_heads import ReplicateKvHeads

# 4 query heads, 2 key heads of 16
TEXT = """
g (int64[batch_size, sequence_length] input_ids) => (float[batch_size, sequence_length, 9] logits)
 <float[9, 32] table, float[32, 64] q_weight, float[32, 32] k_weight, float[32, 32] v_weight, float[64, 9] out,
  int64[4] q_shape = {0, 0, 4, 16}, int64[4] k_shape = {0, 0, 2, 16}, int64[3] flat = {0, 0, 64},
  int64[1] two = {2}, int64[5] times = {1, 1, 2, 1, 1}, int64[4] grouped = {0, 4, -1, 16}, float[32] bias,
  float low = {-10000}, float none = {0}, int64 zero = {0}, int64 one = {1}, int64[2] column = {-1, 1},
  float scale = {0.25}>
{
  x = Gather(table, input_ids)
  shape = Shape(input_ids)
  length = Gather(shape, one)
  row = Range(zero, length, one)
  rows = Reshape(row, column)
  seen = LessOrEqual(row, rows)
  mask = Where(seen, none, low)
  q = MatMul(x, q_weight)
  q4 = Reshape(q, q_shape)
  qt = Transpose<perm = [0, 2, 1, 3]>(q4)
  k0 = MatMul(x, k_weight)
  k = Add(k0, bias)
  k4 = Reshape(k, k_shape)
  kt = Transpose<perm = [0, 2, 1, 3]>(k4)
  k5 = Unsqueeze(kt, two)
  kr = Expand(k5, times)
  kh = Reshape(kr, grouped)
  kx = Transpose<perm = [0, 1, 3, 2]>(kh)
  v = MatMul(x, v_weight)
  v4 = Reshape(v, k_shape)
  vt = Transpose<perm = [0, 2, 1, 3]>(v4)
  v5 = Unsqueeze(vt, two)
  vr = Expand(v5, times)
  vh = Reshape(vr, grouped)
  raw = MatMul(qt, kx)
  scores = Mul(raw, scale)
  masked = Add(scores, mask)
  weights = Softmax(masked)
  context = MatMul(weights, vh)
  back = Transpose<perm = [0, 2, 1, 3]>(context)
  joined = Reshape(back, flat)
  logits = MatMul(joined, out)
}
"""


def dynamic(folder, per_channel):
    """`DynamicQuantizeLinear` and `MatMulInteger`."""
    quantization.quantize_dynamic(folder / "float.onnx", folder / "made.onnx", per_channel=per_channel)


def static(folder, form, per_channel):
    """`QuantizeLinear` and `DequantizeLinear` around each product, or `QLinearMatMul`."""

    class Texts(quantization.CalibrationDataReader):
        def __init__(self):
            model = onnx.load(folder / "float.onnx")
            self.given = iter([texts(model, seed=seed) for seed in range(3)])

        def get_next(self):
            return next(self.given, None)

    quantization.quantize_static(
        folder / "float.onnx", folder / "made.onnx", Texts(), quant_format=form, per_channel=per_channel,
        op_types_to_quantize=["MatMul"],
    )  # fmt: skip


def blocked(folder, form, symmetric):
    """`MatMulNBits`, or `DequantizeLinear` of blocks of 4-bit numbers."""
    maker = matmul_nbits_quantizer.MatMulNBitsQuantizer(
        onnx.load(folder / "float.onnx"), block_size=16, is_symmetric=symmetric, quant_format=form
    )
    maker.process()
    maker.model.save_model_to_file(str(folder / "made.onnx"))


QDQ, OPERATORS = quantization.QuantFormat.QDQ, quantization.QuantFormat.QOperator
CASES = {
    "dynamic": lambda folder: dynamic(folder, False),
    "dynamic, per channel": lambda folder: dynamic(folder, True),
    "QDQ": lambda folder: static(folder, QDQ, False),
    "QDQ, per channel": lambda folder: static(folder, QDQ, True),
    "QLinearMatMul": lambda folder: static(folder, OPERATORS, False),
    "QLinearMatMul, per channel": lambda folder: static(folder, OPERATORS, True),
    "4 bits": lambda folder: blocked(folder, OPERATORS, True),
    "4 bits, zero points": lambda folder: blocked(folder, OPERATORS, False),
    "4 bits, DequantizeLinear": lambda folder: blocked(folder, QDQ, True),
    "4 bits, DequantizeLinear, zero points": lambda folder: blocked(folder, QDQ, False),
}
FUSED = {
    "DynamicQuantizeMatMul": "com.microsoft.DynamicQuantizeMatMul(x, {0}_whole, {0}_scales, {0}_points, bias)",
    "MatMulIntegerToFloat": (
        "com.microsoft.MatMulIntegerToFloat(xq, {0}_whole, step, {0}_scales, middle, {0}_points, bias)"
    ),
    "FusedMatMul": "com.microsoft.FusedMatMul<alpha = 0.5>(x, {0}_weight)",
    "TransposeMatMul": "com.microsoft.TransposeMatMul<transB = 1>(x, {0}_weight)",
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """A model that onnxruntime quantised."""
    folder = tmp_path_factory.mktemp("quantised")
    onnx.save(read(TEXT, 21), folder / "float.onnx")
    CASES[request.param](folder)
    return folder / "made.onnx"


def logits(proto):
    return in_onnxruntime(proto)(texts(proto, length=7))["logits"]


def stored(proto):
    """What is stored in whole numbers, by name."""
    found = {one.name: onnx.numpy_helper.to_array(one) for one in proto.graph.initializer}
    return {name: array for name, array in found.items() if array.ndim > 1 and array.dtype.kind not in "fb"}


@pytest.mark.parametrize("change", [ExpandGqa(), ReplicateKvHeads(repeat=2)])
def test_stored_numbers_stay_what_they_are(made, change):
    given = Subject.of(made)
    before = io.to_proto(given.model)

    outcome = change.apply(given)

    after = io.to_proto(given.model)
    assert isinstance(outcome, Changed)
    assert outcome.exact
    assert difference(logits(after), logits(before)) < 1e-6
    old, new = stored(before), stored(after)
    grown = [name for name in new if name in old and new[name].size == 2 * old[name].size]
    assert len(grown) >= 2, "neither keys nor values are stored in whole numbers"
    for name, array in new.items():
        assert array.dtype == old[name].dtype
        assert set(np.unique(array.astype(int))) == set(np.unique(old[name].astype(int)))


def test_the_first_of_equal_heads_is_the_original(made):
    given = Subject.of(made)
    before = logits(io.to_proto(given.model))
    ReplicateKvHeads(repeat=2).apply(given)

    MergeKvHeads(kv_heads=2, method="first").apply(given)

    assert difference(logits(io.to_proto(given.model)), before) < 1e-6


def test_stored_numbers_have_no_mean(made):
    with pytest.raises(Refused, match=r"quantised weights have no mean.*method=first"):
        MergeKvHeads(kv_heads=1).apply(Subject.of(made))


@pytest.mark.parametrize("name", FUSED)
def test_operators_that_optimisers_make(name):
    product = FUSED[name]
    text = TEXT.replace("k = Add(k0, bias)", "k = Identity(k0)")
    for kind in "kv":
        text = text.replace(f"MatMul(x, {kind}_weight)", product.format(kind))
        more = f"uint8[32, 32] {kind}_whole, float[32] {kind}_scales, uint8[32] {kind}_points"
        text = text.replace("float[32] bias", f"float[32] bias, {more}", 1)
    text = text.replace("float[32] bias", "float[32] bias, float step = {0.02}, uint8 middle = {128}", 1)
    given = Subject.of(read(text.replace("  shape = ", "  xq = QuantizeLinear(x, step, middle)\n  shape = "), 21))
    before = logits(io.to_proto(given.model))

    ExpandGqa().apply(given)

    assert difference(logits(io.to_proto(given.model)), before) < 1e-6
    MergeKvHeads(kv_heads=2, method="first").apply(given)
    assert difference(logits(io.to_proto(given.model)), before) < 1e-6
