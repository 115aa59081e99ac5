"""The tolerance follows from the arithmetic of a model."""

import numpy as np
import onnx
import pytest

from kvsurgeon.errors import InvalidModelError, UsageError
from kvsurgeon.parity import TOLERANCES, TextLengths, arithmetic_of, load_graph
from kvsurgeon.parity.difference import error_map, expected_part, scale_of, spread, worst

ARITHMETIC = {
    "float32": "g (float[N] x) => (float[N] y) { y = Neg(x) }",
    "float64": "g (double[N] x) => (double[N] y) { y = Neg(x) }",
    "float16": "g (float[N] x) => (float[N] y) { a = Cast<to=10>(x) y = Cast<to=1>(a) }",
    "bfloat16": "g (float16[N] x) => (bfloat16[N] y) { y = Cast<to=16>(x) }",
    "quantized": "g (float[N] x, float s, uint8 z) => (uint8[N] y) { y = QuantizeLinear(x, s, z) }",
    "dynamic": """g (float[N] x, bool c) => (uint8[N] y) {
        y = If(c) <then_branch = a () => (uint8[N] p) { p, s, z = DynamicQuantizeLinear(x) },
                   else_branch = b () => (uint8[N] q) { q, t, u = DynamicQuantizeLinear(x) }>
    }""",
}


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_arithmetic_is_the_coarsest_in_the_graph(arithmetic):
    header = '<ir_version: 10, opset_import: ["" : 21]>'
    assert arithmetic_of(onnx.parser.parse_model(header + ARITHMETIC[arithmetic])) == arithmetic


@pytest.mark.parametrize(("operator", "arithmetic"), [("Identity", "float16"), ("Cast<to=1>", "float32")])
def test_weights_that_are_cast_first_do_not_count(operator, arithmetic):
    graph = f"g (float[N,8] x) => (float[N,8] y) {{ v = {operator}(w) y = MatMul(x, v) }}"
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + graph)
    model.graph.initializer.append(onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT16, dims=[8, 8]))
    assert arithmetic_of(model) == arithmetic


@pytest.mark.parametrize(("level", "arithmetic"), [(0, "float32"), (4, "quantized")])
def test_block_quantized_weights_count_only_if_activations_are_rounded(level, arithmetic):
    graph = f"g (float[N,32] x) => (float[N,8] y) {{ y = com.microsoft.MatMulNBits<accuracy_level={level}>(x, x, x) }}"
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>' + graph)

    assert arithmetic_of(model) == arithmetic


@pytest.mark.parametrize(("block", "weights"), [(32, onnx.TensorProto.INT8), (0, onnx.TensorProto.INT4)])
def test_products_that_onnxruntime_fuses_with_dequantized_weights_round_activations(block, weights):
    graph = "g (float[N,32] x, int8[32,8] q, float[1,8] s) => (float[N,8] y) { w = DequantizeLinear<block_size=0>(q, s)"
    model = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>' + graph + " y = MatMul(x, w) }")
    assert arithmetic_of(model) == "float32"
    model.graph.node[0].attribute[0].i = block
    model.graph.initializer.append(onnx.TensorProto(name="q", data_type=weights, dims=[32, 8]))

    assert arithmetic_of(model) == "quantized"


def test_each_tolerance_has_a_reason_and_is_below_the_error_of_a_wrong_cache():
    assert set(TOLERANCES) == set(ARITHMETIC)
    for tolerance in TOLERANCES.values():
        assert tolerance.reason
        assert 0 < tolerance.bound < 0.5
        assert 0.5 < tolerance.agreement <= 1


def test_names_a_file_that_is_not_onnx(tmp_path):
    (tmp_path / "model.onnx").write_text("not a model")
    with pytest.raises(InvalidModelError, match=r"model\.onnx"):
        load_graph(tmp_path)


def test_lengths_are_at_least_one():
    with pytest.raises(UsageError, match="at least 1"):
        TextLengths(short=0)


def test_the_spread_of_nothing_and_of_a_constant_is_one():
    assert spread(np.array([np.nan, np.inf])) == 1.0
    assert spread(np.full(5, 3.0)) == 1.0


@pytest.mark.parametrize("masked", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("value", [-1e4, -1e9, -np.inf])
def test_masked_entries_do_not_change_the_spread(masked, value):
    normal = np.random.default_rng(0).standard_normal(10_000)
    count = int(10_000 * masked / (1 - masked))

    assert 0.5 < spread(np.append(normal, np.full(count, value))) < 1.2


def test_a_large_feature_has_a_scale_of_its_own():
    values = np.random.default_rng(0).standard_normal((2, 99, 4)) * [1, 1, 1, 300]
    scale = np.broadcast_to(scale_of(values, (0, 1)), values.shape)[0, 0]

    assert scale[3] > 200
    assert scale[:3].max() < 2


def test_a_number_of_more_than_three_scales_is_compared_with_itself():
    expected = np.array([[[-1e9, 1.0]]])
    rounded, wrong = (
        error_map(expected, expected + np.array(change), batch=0, sequence=1, scale=1.0).max()
        for change in ([64.0, 0.0], [0.0, 1e-3])
    )

    assert rounded < 1e-6
    assert wrong == pytest.approx(1e-3)


def test_sizes_give_the_part_of_a_chunk():
    whole = np.arange(2 * 7 * 7).reshape(2, 7, 7)

    assert np.array_equal(expected_part(whole, (2, 2, 5), 3, 5), whole[:, 3:5, :5])
    assert np.array_equal(expected_part(whole, (2, 7, 7), 0, 7), whole)
    assert expected_part(whole, (2, 3, 5), 3, 5) is None
    assert expected_part(whole, (2, 2), 3, 5) is None


def test_error_is_zero_if_no_token_counts():
    assert worst(np.ones((1, 2)), np.zeros((1, 2), bool), 5) == (0.0, 0, 5)


def test_nan_is_an_infinite_error_and_equal_infinities_are_none():
    expected = np.array([[[1.0, -np.inf]], [[1.0, 2.0]]])
    found = np.array([[[1.0, -np.inf]], [[np.nan, 2.0]]])

    assert error_map(expected, found, batch=0, sequence=1, scale=1.0).tolist() == [[0.0], [np.inf]]
