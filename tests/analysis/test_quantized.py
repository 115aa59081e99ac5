"""Quantized operators, and those of onnxruntime's optimizer, are position-wise like plain ones."""

# ruff: noqa: E501  # a case is read best on one line

import onnx
import pytest
from attentions import assert_law_of, attention
from exports import injected
from written import read

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.contract import Subject

SCALES = "float s1 = {0.03}, uint8 z1 = {128}, float s2 = {0.05}, uint8[8, 8] w8"

# From u [b, n, 8], quantized tokens, to y9 [b, n, 8].
QUANTIZED = [
    ("QLinearAdd", "y9 = com.microsoft.QLinearAdd(u, s1, z1, u, s1, z1, s2, z1)", ""),
    ("QLinearMul", "y9 = com.microsoft.QLinearMul(u, s1, z1, u, s1, z1, s2, z1)", ""),
    ("QLinearSigmoid", "y9 = com.microsoft.QLinearSigmoid(u, s1, z1, s2, z1)", ""),
    ("QLinearLeakyRelu", "y9 = com.microsoft.QLinearLeakyRelu<alpha = 0.1>(u, s1, z1, s2, z1)", ""),
    ("QLinearWhere", "p = Greater(x, nil)\n y9 = com.microsoft.QLinearWhere(p, u, s1, z1, u, s2, z1, s2, z1)", "float nil = {0.0}"),
    ("QLinearSoftmax", "y9 = com.microsoft.QLinearSoftmax<axis = -1, opset = 13>(u, s1, z1, s2, z1)", ""),
    ("QLinearConcat", "a, z = Split<axis = 2, num_outputs = 2>(u)\n y9 = com.microsoft.QLinearConcat<axis = 2>(s2, z1, z, s1, z1, a, s1, z1)", ""),
    ("QLinearConv", "cc = Transpose<perm = [0, 2, 1]>(u)\n d = QLinearConv(cc, s1, z1, kernel, s1, z1, s2, z1)\n y9 = Transpose<perm = [0, 2, 1]>(d)", "uint8[8, 8, 1] kernel"),
    ("QLinearAveragePool", "a = com.microsoft.QLinearAveragePool<kernel_shape = [3], pads = [1, 1]>(u, s1, z1, s2, z1)\n y9 = Identity(a)", ""),
    ("QGemm", "f = Flatten<axis = 2>(u)\n g = com.microsoft.QGemm(f, s1, z1, w8, s1, z1, nobias, s2, z1)\n y9 = Reshape(g, sizes)", "int32[8] nobias"),
]  # fmt: skip

# From x [b, n, 8] to h [b, n, 8].
OPTIMIZED = [
    ("FusedMatMul with its rows before the batch", "t = Transpose<perm = [1, 0, 2]>(x)\n h = com.microsoft.FusedMatMul<transBatchA = 1>(t, w3)\n w3 = Unsqueeze(wq, first)", ""),
    ("FusedMatMul with its columns before the batch", "t = Transpose<perm = [2, 0, 1]>(x)\n h = com.microsoft.FusedMatMul<transA = 1, transBatchA = 1>(t, w3)\n w3 = Unsqueeze(wq, first)", ""),
    ("TransposeMatMul", "h = com.microsoft.TransposeMatMul<transB = 1>(x, wq)", ""),
    ("FusedGemm", 'f = Flatten<axis = 2>(x)\n g = com.microsoft.FusedGemm<activation = "Relu">(f, wq, bias)\n h = Reshape(g, sizes)', "float[8] bias"),
    ("FusedConv", 'cc = Transpose<perm = [0, 2, 1]>(x)\n d = com.microsoft.FusedConv<activation = "Relu">(cc, kernel)\n h = Transpose<perm = [0, 2, 1]>(d)', "float[8, 8, 1] kernel"),
    ("AveragePool over features", "a = AveragePool<kernel_shape = [3], pads = [1, 1]>(x)\n h = Sub(x, a)", ""),
    ("MaxPool over features", "a = MaxPool<kernel_shape = [2], strides = [2]>(x)\n h = MatMul(a, w48)", "float[4, 8] w48"),
    ("MatMulIntegerToFloat", "u = QuantizeLinear(x, s1, z1)\n h = com.microsoft.MatMulIntegerToFloat(u, w8, s1, s1, z1, z1, bias)", f"{SCALES}, float[8] bias"),
    ("DynamicQuantizeMatMul", "y = Sign(x)\n h = com.microsoft.DynamicQuantizeMatMul(y, w8, s1, z1)", SCALES),
    ("GatherBlockQuantized", "m = ArgMax<axis = 2, keepdims = 0>(x)\n g = com.microsoft.GatherBlockQuantized<block_size = 16>(packed, m, scales)\n h = MatMul(g, w16)",
     "uint8[8, 8] packed, float[8, 1] scales = {0.02, 0.03, 0.05, 0.02, 0.03, 0.05, 0.02, 0.03}, float[16, 8] w16"),
]  # fmt: skip


@pytest.mark.parametrize(("made", "constants"), [pytest.param(*case[1:], id=case[0]) for case in QUANTIZED])
def test_quantized_operators_are_position_wise(made, constants):
    hidden = f"u = QuantizeLinear(x, s1, z1)\n {made}\n h = DequantizeLinear(y9, s2, z1)"
    assert_law_of(attention(hidden=hidden, constants=f"{SCALES}{constants and ', ' + constants}"))


@pytest.mark.parametrize(("hidden", "constants"), [pytest.param(*case[1:], id=case[0]) for case in OPTIMIZED])
def test_operators_of_an_optimizer_are_position_wise(hidden, constants):
    assert_law_of(attention(hidden=hidden, constants=constants))


@pytest.mark.parametrize(
    ("hidden", "constants"),
    [("u = QuantizeLinear(x, s1, z1)\n y9 = com.microsoft.QLinearSoftmax<axis = 1, opset = 13>(u, s1, z1, s1, z1)\n h = DequantizeLinear(y9, s2, z1)", SCALES),
     ("u = QuantizeLinear(x, s1, z1)\n y9 = com.microsoft.QLinearSoftmax<axis = 1, opset = 12>(u, s1, z1, s1, z1)\n h = DequantizeLinear(y9, s2, z1)", SCALES),
     ("cc = Transpose<perm = [0, 2, 1]>(x)\n d = AveragePool<kernel_shape = [3], pads = [1, 1]>(cc)\n h = Transpose<perm = [0, 2, 1]>(d)", ""),
     ("cc = Transpose<perm = [0, 2, 1]>(x)\n d = MaxPool<kernel_shape = [1], pads = [0, 1]>(cc)\n e = Transpose<perm = [0, 2, 1]>(d)\n h = Slice(e, second, end, second)", "int64[1] end = {100000000}"),
     ("h, places = MaxPool<kernel_shape = [1]>(x)\n p = Cast<to = 1>(places)\n k9 = Add(h, p)", ""),
     ("t = Transpose<perm = [2, 1, 0]>(x)\n g = com.microsoft.FusedMatMul<transBatchA = 1, transBatchB = 1>(t, x)\n r = ReduceSum(g, second)\n h = Add(x, r)", ""),
     ("cc = Transpose<perm = [0, 2, 1]>(x)\n d = Conv<pads = [1, 1]>(cc, kernel)\n e = Transpose<perm = [0, 2, 1]>(d)\n h = Slice(e, first, end, second)", "float[8, 8, 3] kernel, int64[1] end = {-1}")],
    ids=["softmax", "softmax of old", "a window", "a shift", "places", "a Gram matrix", "a convolution"],
)  # fmt: skip
def test_what_mixes_tokens_is_refused(hidden, constants):
    text = attention(hidden=hidden, constants=constants)
    if "k9" in text:
        text = text.replace("k0 = MatMul(h, wk)", "k0 = MatMul(k9, wk)")
    with pytest.raises(UnsupportedError):
        Subject.of(read(text)).decoder()


@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 0), ("int8", -128)])
def test_quantized_weights_count_from_their_zero_point(dtype, zero):
    # What a mask leaves nothing of is the zero point, which need not be 0; scores and weights are quantized as well.
    text = attention(
        scores="s = DequantizeLinear(sq, s2, z1)\n uq = QuantizeLinear(q, s1, z1)\n ut = QuantizeLinear(kt, s1, z1)\n"
        "sq = QLinearMatMul(uq, s1, z1, ut, s1, z1, s2, z1)",
        constants=f"{SCALES}, float s3 = {{0.0039}}, {dtype} z3 = {{{zero}}}, {dtype} z4 = {{3}}",
    )
    text = text.replace("s0 = MatMul(q, kt)\n", "")
    text = text.replace("c = MatMul(w, v)", "wu = QuantizeLinear(w, s3, z3)\n vu = QuantizeLinear(v, s1, z4)\n"
                        "cu = QLinearMatMul(wu, s3, z3, vu, s1, z4, s2, z4)\n c = DequantizeLinear(cu, s2, z4)")  # fmt: skip
    assert_law_of(text)


# Keys are quantized in a range of the call, and then transposed.
DYNAMIC = attention(
    scores="""u, us, up = DynamicQuantizeLinear(k)
 ut = Transpose<perm = [0, 2, 1]>(u)
 qu, qs, qp = DynamicQuantizeLinear(q)
 i = MatMulInteger(qu, ut, qp, up)
 f = Cast<to = 1>(i)
 both = Mul(qs, us)
 s = Mul(f, both)"""
).replace("kt = Transpose<perm = [0, 2, 1]>(k)\n  s0 = MatMul(q, kt)", "")


def test_keys_in_a_range_of_the_call_are_cached_before_quantization():
    original = read(DYNAMIC)
    model = injected(original)
    past = next(value for value in model.graph.input if value.name.endswith("key"))
    assert past.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    report = verify(original, model, threads=1, effort="quick")
    assert report.verdict == "same"
    assert report.error < 1e-4


@pytest.mark.parametrize(
    "change",
    [("logits = Identity(c)", "kd = DequantizeLinear(u, us, up)\n logits = Add(c, kd)"),
     ("qu, qs, qp = DynamicQuantizeLinear(q)", "qu = Identity(u)\n qs = Identity(us)\n qp = Identity(up)")],
    ids=["the new keys", "queries"],
)  # fmt: skip
def test_a_range_of_keys_that_others_share_is_refused(change):
    """Keys so far are quantized in their range, and the new rows in theirs."""
    with pytest.raises(UnsupportedError, match="a range that other readers of the same tensor use"):
        injected(read(DYNAMIC.replace(*change)))
