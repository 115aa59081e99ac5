"""KV head passes on quantized weights: stored numbers are copied, for every quantization of onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from grouped import grouped_attention, logits
from laws import difference, texts
from onnxruntime import quantization
from onnxruntime.quantization import matmul_nbits_quantizer
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads

SIZES = {"hidden": 32, "head_dim": 16}


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
    """A model that onnxruntime quantized."""
    folder = tmp_path_factory.mktemp("quantized")
    biased = "k0 = MatMul(x, k_weight) k = Add(k0, bias)"
    text = grouped_attention(keys=biased, constants="float[32] bias", **SIZES)
    onnx.save(read(text, 21), folder / "float.onnx")
    CASES[request.param](folder)
    return folder / "made.onnx"


def stored(subject):
    """The stored integers by name of their initializer."""
    found = {name: value.const_value.numpy() for name, value in subject.model.graph.initializers.items()}
    return {name: array for name, array in found.items() if array.ndim > 1 and array.dtype.kind not in "fb"}


@pytest.mark.parametrize("change", [ExpandGqa(), ReplicateKvHeads(repeat=2)])
def test_stored_integers_are_copied(made, change):
    given = Subject.of(made)
    before, answer = stored(given), logits(given)

    outcome = change.apply(given)

    after = stored(given)
    assert isinstance(outcome, Changed)
    assert outcome.exact
    assert difference(logits(given), answer) < 1e-6
    grown = [name for name in after if name in before and after[name].size == 2 * before[name].size]
    assert len(grown) >= 2, "neither keys nor values are stored as integers"
    for name, array in after.items():
        assert array.dtype == before[name].dtype
        assert set(np.unique(array.astype(int))) == set(np.unique(before[name].astype(int)))


def test_taking_the_first_of_equal_heads_restores_the_original(made):
    given = Subject.of(made)
    before = logits(given)
    ReplicateKvHeads(repeat=2).apply(given)

    MergeKvHeads(kv_heads=2, method="first").apply(given)

    assert difference(logits(given), before) < 1e-6


def test_quantized_weights_have_no_mean(made):
    with pytest.raises(UnsupportedError, match=r"quantized weights cannot be averaged.*method=first"):
        MergeKvHeads(kv_heads=1).apply(Subject.of(made))


@pytest.mark.parametrize("name", FUSED)
def test_fused_quantized_operators(name):
    weights = "uint8[32, 32] {0}_whole, float[32] {0}_scales, uint8[32] {0}_points"
    text = grouped_attention(
        keys="k = " + FUSED[name].format("k"),
        values="v = " + FUSED[name].format("v"),
        context="xq = QuantizeLinear(x, step, middle)",
        constants=f"float[32] bias, float step = {{0.02}}, uint8 middle = {{128}}, {weights.format('k')}, "
        + weights.format("v"),
        **SIZES,
    )
    given = Subject.of(read(text, 21))
    before = logits(given)

    ExpandGqa().apply(given)

    assert difference(logits(given), before) < 1e-6
    MergeKvHeads(kv_heads=2, method="first").apply(given)
    assert difference(logits(given), before) < 1e-6
