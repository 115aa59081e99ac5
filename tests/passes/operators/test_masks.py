"""float16-mask-range raises masks to the range of float16, and remove-nan-guards removes guards of finite masks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attentions import attention
from laws import ALLOWED, difference, in_onnxruntime, texts
from onnx import numpy_helper
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.passes.operators.float16_mask_range import float16_mask_range
from kvsurgeon.passes.operators.remove_nan_guards import RemoveNanGuards
from kvsurgeon.workflow.pipeline import Pipeline

LOWEST = float(np.finfo(np.float32).min)
PADDED = (
    "real = Cast<to = 9>(attention_mask)\n  keys = Unsqueeze(real, second)\n  late = LessOrEqual(row, column)\n"
    "  allowed = And(late, keys)"
)
GUARDED = "w0 = Softmax<axis = -1>(masked_scores)\n  bad = IsNaN(w0)\n  w = Where(bad, nothing, w0)"
INFINITIES = (
    "hidden = Slice(sizes, second, third)\n  most = ConstantOfShape<value = float[1] {-inf}>(hidden)\n"
    "  masked_scores = Where(allowed, s, most)"
)


def guarded(low="-10000.0", **parts):
    """Return an attention with left padding, in which all keys of a padding query are masked."""
    inputs = {"inputs": "int64[b, n] attention_mask", "constants": "float nothing = {0.0}", "allowed": PADDED}
    text = attention(**inputs, **parts).replace("-10000.0", low)
    return read(text.replace("w = Softmax<axis = -1>(masked_scores)", GUARDED))


INFINITE = {"scalar": guarded("-inf"), "tensor": guarded(masked=INFINITIES)}


@pytest.mark.parametrize("name", INFINITE)
def test_guards_stay_if_a_mask_is_minus_infinity(name):
    subject = Subject.of(INFINITE[name])
    before = io.to_proto(subject.model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match="float16-mask-range"):
        RemoveNanGuards().apply(subject)
    assert io.to_proto(subject.model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", INFINITE)
def test_guards_are_removed_after_float16_mask_range(name):
    model = INFINITE[name]
    result = io.to_proto(Pipeline((float16_mask_range, RemoveNanGuards())).run(model).model)
    assert "IsNaN" not in {node.op_type for node in result.graph.node}
    feeds = texts(model)
    real = feeds["attention_mask"].astype(bool)
    expected, found = (in_onnxruntime(one)(feeds)["logits"][real] for one in (model, result))
    assert difference(found, expected) <= ALLOWED["float32"]


def test_infinities_before_the_score_product_are_no_mask():
    model = guarded(hidden="h = Max(x, endless)")
    model.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "endless"))
    assert isinstance(RemoveNanGuards().apply(Subject.of(model)), Changed)


FIXED = attention(masked="wide = VIEW\n  masked_scores = Add(s, wide)")
VIEWS = {
    "expand": ("Expand(table, sizes_of_view)", [2, 9, 9]),
    "tile": ("Tile(table, sizes_of_view)", [2, 1, 1]),
    "gather": ("Gather<axis = 1>(table, sizes_of_view)", [*range(9)]),
    "slice": ("Slice(table, sizes_of_view, ends, axes)", [0]),
}


@pytest.mark.parametrize("view", VIEWS)
def test_a_mask_table_of_fixed_length_is_raised(view):
    text, numbers = VIEWS[view]
    model = read(FIXED.replace("VIEW", text).replace("[b, n, 8]", "[2, 9, 8]"))
    constants = {"sizes_of_view": numbers, "ends": [9], "axes": [1]}
    tables = {name: np.array(values, np.int64) for name, values in constants.items()}
    tables["table"] = np.triu(np.full((1, 9, 9), LOWEST, np.float32), 1)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tables.items())
    result = io.to_proto(Pipeline((float16_mask_range,)).run(model).model)
    lowest = min(float(numpy_helper.to_array(one).min()) for one in result.graph.initializer)
    assert lowest == -10_000
    feeds = texts(model)
    expected, found = (in_onnxruntime(one)(feeds)["logits"] for one in (model, result))
    assert difference(found, expected) <= ALLOWED["float32"]


QUANTIZED = """case (bool[4, 4] visible, float[4, 4] s) => (float[4, 4] y)
<float low = {{{low}}}, float nought = {{0.0}}, float step = {{{step}}}, uint8 top = {{255}}>
{{
  mask = Where(visible, nought, low)
  whole = QuantizeLinear(mask, step, top)
  steps = DequantizeLinear(whole, step, top)
  y = Add(s, steps)
}}"""


def test_a_mask_with_a_large_quantization_scale_is_rejected():
    with pytest.raises(UnsupportedError, match="round its new minimum to 0"):
        Pipeline((float16_mask_range,)).run(read(QUANTIZED.format(low=LOWEST, step=-LOWEST / 255)))


def test_a_mask_with_a_small_quantization_scale_is_raised():
    assert Pipeline((float16_mask_range,)).run(read(QUANTIZED.format(low=LOWEST, step=100.0))).changed


@pytest.mark.parametrize(
    "text",
    [
        attention().replace("-10000.0", str(LOWEST)),
        attention(masked="gone = Not(allowed)\n  g = Cast<to = 1>(gone)\n  far = Mul(g, low)\n"
                  "  masked_scores = Add(s, far)").replace("-10000.0", str(LOWEST)),
    ],
    ids=["where", "add"],
)  # fmt: skip
def test_scalar_masks_are_raised(text):
    model = read(text)
    result = io.to_proto(Pipeline((float16_mask_range,)).run(model).model)
    numbers = [onnx.numpy_helper.to_array(tensor) for tensor in result.graph.initializer]
    assert min(float(array.min()) for array in numbers) >= -10_000
    feeds = texts(model)
    expected, found = (in_onnxruntime(one)(feeds)["logits"] for one in (model, result))
    assert difference(found, expected) <= ALLOWED["float32"]


def test_a_bound_of_clip_is_no_mask():
    model = read(f"case (float[b, 4] x) => (float[b, 4] y) <float low = {{{LOWEST}}}> {{ y = Clip(x, low) }}")
    outcome = Pipeline((float16_mask_range,)).run(model)
    assert not outcome.changed


def test_bfloat16_masks_are_unchanged():
    model = read(
        "case (bool[b, 4] visible, bfloat16[b, 4] s, bfloat16 low) => (bfloat16[b, 4] y) { y = Where(visible, s, low) }"
    )
    lowest = onnx.helper.make_tensor("low", onnx.TensorProto.BFLOAT16, [], [LOWEST])
    model.graph.initializer.append(lowest)
    del model.graph.input[2]
    assert not Pipeline((float16_mask_range,)).run(model).changed
