"""Heads that are repeated before a rotation are cached once, rotated, if all copies are rotated alike."""

import onnx
import onnx_ir as ir
import pytest
from exports import injected
from laws import assert_law
from written import read

from kvsurgeon.rewrite import late_repetition

TEXT = """
rotated (int64[batch, length] input_ids) => (float[batch, length, 8] logits)
<float[9, 8] table, float[8, 8] wq, float[8, 4] wk, float[8, 4] wv, int64[4] split = {0, 0, 4, 2},
 int64[4] split_kv = {0, 0, 2, 2}, int64[3] merge = {0, 0, 8}, int64[5] copies = {1, 1, 1, 2, 1}, int64[1] three = {3},
 int64[1] first = {0}, int64[1] second = {1}, int64[1] two = {2}, int64 nought = {0}, int64 one = {1},
 float[2] frequencies = {1.0, 0.3}, float masked = {-10000.0}, float[4, 1, 1] each = {1.0, 1.0, -0.5, 2.0},
 float[1, 1, 1] all = {0.5}, int64[8] again = {0, 0, 1, 1, 2, 2, 3, 3}, float step = {0.1}, int8 zero = {0},
 float[4] steps = {0.1, 0.1, 0.2, 0.1}, int8[4] zeros = {0, 0, 0, 0}>
{
  x = Gather(table, input_ids)
  sizes = Shape(input_ids)
  n1 = Slice(sizes, second, two)
  n = Squeeze(n1)
  at = Range(nought, n, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  visible = LessOrEqual(row, column)
  places = Cast<to = 1>(column)
  angles = Mul(places, frequencies)
  cosines = Cos(angles)
  sines = Sin(angles)
  q = MatMul(x, wq)
  q4 = Reshape(q, split)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  k = MatMul(x, wk)
  k4 = Reshape(k, split_kv)
  k5 = Unsqueeze(k4, three)
  k_all = Expand(k5, copies)
  k_merged = Reshape(k_all, split)
  kh = Transpose<perm = [0, 2, 1, 3]>(k_merged)
  left, right = Split<axis = -1, num_outputs = 2>(kh)
  minus = Neg(right)
  half = Concat<axis = -1>(minus, left)
  kc = Mul(kh, cosines)
  ks = Mul(half, sines)
  rotated = Add(kc, ks)
  LAST
  kt = Transpose<perm = [0, 1, 3, 2]>(keys)
  s = MatMul(qh, kt)
  shown = Where(visible, s, masked)
  w = Softmax<axis = -1>(shown)
  v = MatMul(x, wv)
  v4 = Reshape(v, split_kv)
  v5 = Unsqueeze(v4, three)
  v_all = Expand(v5, copies)
  v_merged = Reshape(v_all, split)
  vh = Transpose<perm = [0, 2, 1, 3]>(v_merged)
  c = MatMul(w, vh)
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  logits = Reshape(ct, merge)
}
"""
ALIKE = {
    "rotated": "keys = Identity(rotated)",
    "scaled by a number": "keys = Mul(rotated, all)",
    "quantized by a number": "kq = QuantizeLinear(rotated, step, zero)  keys = DequantizeLinear(kq, step, zero)",
}
UNLIKE = {
    "scaled by head": "keys = Mul(rotated, each)",
    "quantized by head": """
  kq = QuantizeLinear<axis = 1>(rotated, steps, zeros)
  keys = DequantizeLinear<axis = 1>(kq, steps, zeros)
""",
    "heads that are rotated in turn": """
  heads_left, heads_right = Split<axis = 1, num_outputs = 2>(rotated)
  heads_minus = Neg(heads_right)
  keys = Concat<axis = 1>(heads_left, heads_minus)
""",
    "sums over heads": "keys = CumSum(rotated, one)",
    "a triangle of heads": """
  heads_last = Transpose<perm = [0, 2, 3, 1]>(rotated)
  lower = Trilu(heads_last)
  keys = Transpose<perm = [0, 3, 1, 2]>(lower)
""",
}


def written(last: str) -> onnx.ModelProto:
    return read(TEXT.replace("LAST", last.replace(")  ", ")\n  ")), opset=18)


@pytest.mark.parametrize("name", ALIKE)
def test_one_of_equal_copies_is_cached_as_it_is_multiplied(name):
    original = written(ALIKE[name])
    proto = injected(original)
    assert_law(original, proto)
    key = next(value for value in proto.graph.input if value.name == "past_key_values.0.key")
    assert key.type.tensor_type.shape.dim[1].dim_value == 2
    readers = {node.op_type for node in proto.graph.node if "present.0.key" in node.input}
    assert readers == {"Gather" if "kq" in ALIKE[name] else "Transpose"}


@pytest.mark.parametrize("name", UNLIKE)
def test_copies_that_differ_later_are_computed_from_what_is_cached(name):
    original = written(UNLIKE[name])
    assert_law(original, injected(original))


@pytest.mark.parametrize("size", [-8, 0])
def test_axes_of_no_elements_hold_no_copies(size):
    """A constant of a damaged file may give a feature axis such a size."""

    class Damaged:
        def of(self, value):
            return [[(size, True), (2, False)]]

    assert late_repetition._copies(Damaged(), ir.Value(name="keys")) == []
