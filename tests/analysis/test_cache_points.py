"""The tensor between projection and product that is cached: the smallest, then the best layout, then the nearest."""

# ruff: noqa: E501  # a case is read best on one line

import onnx_ir as ir
import pytest
from attentions import attention
from laws import assert_law
from written import read

from kvsurgeon import io
from kvsurgeon.analysis.cache_points import CachePoint
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject


def cache_points(text: str) -> tuple[str, str]:
    (found,) = Subject.of(read(text)).decoder().attentions
    return found.key_cache.value, found.value_cache.value


CASES = [
    ("the nearest to the product", attention(key="a = Abs(k0)\n k = Neg(a)"), "k"),
    ("after a norm and a scale", attention(key="n2 = LpNormalization<axis = -1>(k0)\n k = Mul(n2, half)"), "k"),
    ("quantized rather than float", attention(constants="float scale = {0.02}, uint8 point = {128}",
     key="u = QuantizeLinear(k0, scale, point)\n k = DequantizeLinear(u, scale, point)"), "u"),
    ("a narrow type rather than a wide one",
     attention(key="f = Cast<to = 10>(k0)\n k = Cast<to = 1>(f)"), "f"),
    ("before a repetition",
     attention(constants="int64[4] four = {1, 1, 2, 1}, int64[3] flat = {0, 0, 8}, float[8, 4] narrow",
               hidden="h = Identity(x)\n kn = MatMul(x, narrow)",
               key="u = Unsqueeze(kn, third)\n t = Tile(u, four)\n k = Reshape(t, flat)"), "u"),
    ("after the rotary embedding", attention(
        key="p = Cast<to = 1>(column)\n wave = Cos(p)\n k = Mul(k0, wave)"), "k"),
    ("never before the projection", attention(key="k = Identity(k0)"), "k"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_cache_point_of_keys(text, expected):
    assert cache_points(text)[0] == expected
    original, subject = read(text), Subject.of(read(text))
    Inject().apply(subject)
    assert_law(original, io.to_proto(subject.model))


MULTI_HEAD = """case (float[b, n, 8] x) => (float[b, n, 8] logits)
<float[8, 8] wq, float[8, 4] wk, float[8, 4] wv, int64 nought = {0}, int64 one = {1}, int64[1] first = {0},
 int64[1] second = {1}, int64[1] third = {2}, float low = {-10000.0}, int64[4] split = {0, 0, 4, 2},
 int64[4] split_kv = {0, 0, 2, 2}, int64[3] merge = {0, 0, 8}, int64[4] join = {0, -1, 4, 2}, int64[5] twice = {1, 1, 1, 2, 1}>
{
  q0 = MatMul(x, wq)
  q4 = Reshape(q0, split)
  q = Transpose<perm = [0, 2, 1, 3]>(q4)
  k0 = MatMul(x, wk)
  k4 = Reshape(k0, split_kv)
  k5 = Unsqueeze(k4, three)
  three = Constant<value_ints = [3]>()
  k_groups = Expand(k5, twice)
  k_heads = Reshape(k_groups, split)
  k = Transpose<perm = [0, 2, 3, 1]>(k_heads)
  v0 = MatMul(x, wv)
  v4 = Reshape(v0, split_kv)
  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  v5 = Unsqueeze(vh, third)
  v_groups = Tile(v5, halves)
  halves = Constant<value_ints = [1, 1, 2, 1, 1]>()
  v_target = Constant<value_ints = [0, 4, -1, 2]>()
  v = Reshape(v_groups, v_target)
  s = MatMul(q, k)
  sizes = Shape(x)
  length = Gather(sizes, one)
  at = Range(nought, length, one)
  row = Unsqueeze(at, first)
  column = Unsqueeze(at, second)
  allowed = LessOrEqual(row, column)
  masked_scores = Where(allowed, s, low)
  w = Softmax<axis = -1>(masked_scores)
  c = MatMul(w, v)
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  logits = Reshape(ct, merge)
}"""


def test_before_the_repetition_of_heads_and_with_the_heads_of_the_product():
    text = read(MULTI_HEAD)
    subject = Subject.of(text)
    subject.model.graph.sort()
    (found,) = subject.decoder().attentions
    assert found.value_cache.value == "vh"
    assert (found.key_cache.heads, found.key_cache.head_dim) == (2, 2)
    assert (found.value_cache.heads, found.value_cache.head_dim) == (2, 2)
    assert (found.query_heads, found.kv_heads) == (4, 2)
    assert found.value_cache.bytes_per_token == 2 * 2 * 4


def test_keys_and_values_of_a_latent_are_cached_instead_of_the_latent():
    text = attention(
        hidden="h = Identity(x)\n latent = MatMul(x, wk)", key="kz = MatMul(latent, wk)\n k = Neg(kz)",
        value="v = MatMul(latent, wv)",
    )  # fmt: skip
    assert cache_points(text) == ("k", "v")


LAYOUTS = [
    ("cache layout", (1, 2, None, 8), (0, 1, 2, 3), True, True),
    ("transposed keys", (1, 2, 8, None), (0, 1, 3, 2), False, True),
    ("no batch, and an axis of size 1", (2, 1, None, 8), (0, 1, 2, 3), False, False),
    ("no batch, and transposed keys", (2, 1, 8, None), (0, 1, 3, 2), False, False),
]


@pytest.mark.parametrize(
    ("parts", "order", "canonical", "four"), [pytest.param(*case[1:], id=case[0]) for case in LAYOUTS]
)
def test_a_batch_of_one_need_not_be_an_axis(parts, order, canonical, four):
    point = CachePoint(
        value=ir.Value(name="k"), dtype=ir.DataType.FLOAT, parts=parts, order=order, batch=1, heads=2, head_dim=8,
        rank=4,
    )  # fmt: skip
    assert (point.is_canonical, point.has_four_parts) == (canonical, four)
