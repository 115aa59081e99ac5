"""Fused operators that optimizers write: each maps tokens one by one, and the sequence axis is traced through it."""

# ruff: noqa: E501  # one case per line

import onnxruntime
import pytest
from attentions import assert_law_of, attention, in_order
from exports import injected
from laws import assert_law, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.decompose import decompose
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject

WEIGHTS = """float[8] g, float[8] e, float[8] bias, float[8, 8] wf, float[4, 16, 8] experts, float[4, 8, 16] back,
 float[8, 4] router, float[4, 8, 16] half_back, int64[2] rows = {-1, 4}, int64[1] last = {-1}, float[4] g4,
 int64[2] flat = {-1, 8}, int64[3] apart = {0, -1, 8}, float[64, 8] table, float[8, 8] left, float[8, 1, 3] taps, uint8[8, 8, 1] kernel, uint8 zu = {9}"""
QUANTIZED = "ct = Transpose<perm = [0, 2, 1]>(c)\n MADE\n i = ConvInteger(u, kernel, zu)\n fi = Cast<to = 1>(i)"
CONVOLVED = "fs = Mul(fi, half)\n logits = Transpose<perm = [0, 2, 1]>(fs)"
AFTER = [
    ("skip and norm", "logits = com.microsoft.SkipLayerNormalization<epsilon = 0.001>(c, x, g, e, bias)"),
    ("skip, and its sum", "n1, , , n2 = com.microsoft.SkipLayerNormalization(c, x, g, e, bias)\n logits = Add(n1, n2)"),
    ("skip without a bias", "n1, , , n2 = com.microsoft.SkipSimplifiedLayerNormalization(c, x, g)\n logits = Add(n1, n2)"),
    ("skip and a bias", "n1, , , n2 = com.microsoft.SkipSimplifiedLayerNormalization(c, x, g, bias)\n logits = Add(n1, n2)"),
    ("skip of context", "line = Slice(table, first, length1, first)\n length1 = Reshape(length, second)\n deep = Unsqueeze(line, first)\n logits = com.microsoft.SkipLayerNormalization(c, deep, g, e)"),
    ("gelus", "a = com.microsoft.BiasGelu(c, bias)\n d = com.microsoft.FastGelu(a, bias)\n q2 = com.microsoft.QuickGelu<alpha = 1.5>(d)\n logits = com.microsoft.Gelu(q2)"),
    ("a causal convolution", "ct = Transpose<perm = [0, 2, 1]>(c)\n r, rl = com.microsoft.CausalConvWithState<ndim = 1, activation = \"silu\">(ct, taps, bias)\n logits = Transpose<perm = [0, 2, 1]>(r)"),
    ("a gated norm", "logits = com.microsoft.GatedRMSNorm<epsilon = 0.001>(c, g4, x)"),
    ("a gated sum", "gate = ReduceMean<keepdims = 1>(x, third)\n logits = com.microsoft.GatedAdd(c, x, gate)"),
    ("a branchwise norm", "logits = com.microsoft.BranchwiseRMSNorm<num_branches = 2>(c, g4)"),
    ("a fused product", "f = com.microsoft.FusedMatMul<alpha = 0.5, transB = 1>(c, wf)\n logits = Add(f, x)"),
    ("experts", "tokens = Reshape(c, flat)\n scores = MatMul(tokens, router)\n m = com.microsoft.MoE<k = 2, activation_type = \"silu\", normalize_routing_weights = 1>(tokens, scores, experts, , back)\n sizes2 = Shape(c)\n logits = Reshape(m, sizes2)"),
    ("experts, batched", "s3 = MatMul(c, router)\n scores = Reshape(s3, rows)\n logits = com.microsoft.MoE<k = 2, activation_type = \"gelu\">(c, scores, experts, , back)"),
    ("an integer convolution", f"{QUANTIZED}\n {CONVOLVED}".replace("MADE", "u = QuantizeLinear(ct, half, zu)")),
]  # fmt: skip


KERNELS_SINCE = {
    "CausalConvWithState": (1, 31),
    "GatedRMSNorm": (1, 30),
    "GatedAdd": (1, 30),
    "BranchwiseRMSNorm": (1, 31),
}  # onnxruntime version


@pytest.mark.parametrize("after", [pytest.param(after, id=title) for title, after in AFTER])
def test_operators_after_attention_keep_the_result(after):
    here = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if any(name in after and here < since for name, since in KERNELS_SINCE.items()):
        pytest.skip("this onnxruntime has no kernel for it yet")
    assert_law_of(attention(after=after, constants=WEIGHTS))


def test_a_dynamically_quantized_convolution_is_noted():
    text = attention(after=f"{QUANTIZED}\n {CONVOLVED}", constants=WEIGHTS.replace(", uint8 zu = {9}", ""))
    subject = Subject.of(in_order(read(text.replace("MADE", "u, su, zu = DynamicQuantizeLinear(ct)"))))
    assert "ranges are taken over the tokens of one call" in Inject().apply(subject).notes[0]


EMBEDDED = """case (int64[b, n] input_ids, int64[b, n] attention_mask) => (float[b, n, 8] logits)
<float[16, 8] words, float[32, 8] places, float[2, 8] kinds, float[8] g, float[8] e, float[8, 24] w, float[24] bias,
 uint8[16, 8] words8, uint8[32, 8] places8, uint8[2, 8] kinds8, uint8[8] g8, uint8[8] e8, float sc = {0.02},
 uint8 z = {7}, float[1, 8, 8] noughts, int64[1] second = {1}>
{
  ids = Cast<to = 6>(input_ids)
  mask = Cast<to = 6>(attention_mask)
  kind = Mod(ids, two)
  two = Cast<to = 6>(second)
  BODY
  a = com.microsoft.Attention<num_heads = 2, unidirectional = 1>(h, w, bias, MASK)
  logits = Add(a, h)
}"""
EMBEDDINGS = [
    ("tokens and positions", "h, ends = com.microsoft.EmbedLayerNormalization(ids, , words, places, , g, e)", "mask"),
    ("and segments", "h, ends = com.microsoft.EmbedLayerNormalization<epsilon = 0.01>(ids, kind, words, places, kinds, g, e)", "mask"),
    ("and the sum", "h0, , sum = com.microsoft.EmbedLayerNormalization(ids, kind, words, places, kinds, g, e)\n h = Add(h0, sum)", "mask"),
    ("and token counts", "h, ends = com.microsoft.EmbedLayerNormalization(ids, kind, words, places, kinds, g, e, mask)", "ends"),
    ("at given positions", "h, ends = com.microsoft.EmbedLayerNormalization(ids, , words, places, , g, e, , ids)", "mask"),
    ("quantized", "h, ends = com.microsoft.QEmbedLayerNormalization(ids, , words8, places8, , g8, e8, , sc, sc, , sc, sc, z, z, , z, z)", "mask"),
    ("quantized, with segments", "h, ends = com.microsoft.QEmbedLayerNormalization(ids, kind, words8, places8, kinds8, g8, e8, mask, sc, sc, sc, sc, sc, z, z, z, z, z)", "ends"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "mask"), [pytest.param(*case, id=title) for title, *case in EMBEDDINGS])
def test_embeddings_compute_the_same(body, mask):
    original = in_order(read(EMBEDDED.replace("BODY", body).replace("MASK", mask)))
    whole = texts(original, padded=mask == "mask")
    decomposed = io.to_proto(decompose(Subject.of(original).model).model)
    found, expected = (in_onnxruntime(one)(whole)["logits"] for one in (decomposed, original))
    assert difference(found, expected, whole["attention_mask"]) < 1e-5
    assert_law(original, injected(original), whole)


STANDARD = """case (float[b, n, 32] x, int64[b, n] attention_mask) => (float[b, n, 32] logits)
<float[32, 32] wq, float[32, 32] wk, float[32, 16] wg, int64[4] apart = {0, 0, -1, 16}, int64[3] flat = {0, 0, -1},
 int64[1] second = {1}, int64[1] first = {0}, int64 nought = {0}, int64 one = {1}, float[64, 64] table>
{
  sizes = Shape(x)
  length = Gather(sizes, one)
  new = Gather(sizes, second)
  texts = Gather(sizes, first)
  all = Expand(new, texts)
  counted = ReduceSum<keepdims = 0>(attention_mask, second)
  row = Range(nought, length, one)
  column = Unsqueeze(row, second)
  allowed = LessOrEqual(row, column)
  bounds = Concat<axis = 0>(new, new)
  bias = Slice(table, noughts, bounds)
  noughts = Concat<axis = 0>(first, first)
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  g = MatMul(x, wg)
  q4 = Reshape(q, apart)
  k4 = Reshape(k, apart)
  g4 = Reshape(g, apart)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  gh = Transpose<perm = [0, 2, 1, 3]>(g4)
  BODY
}"""
TOGETHER = "ct = Transpose<perm = [0, 2, 1, 3]>(c)\n logits = Reshape(ct, flat)"
ATTENTION = [
    ("causal", f"c = Attention<is_causal = 1>(qh, kh, kh, , , , all)\n {TOGETHER}"),
    ("masked", f"c = Attention(qh, kh, kh, allowed, , , all)\n {TOGETHER}"),
    ("sharing heads", f"c = Attention<is_causal = 1, scale = 0.3>(qh, gh, gh, , , , all)\n {TOGETHER}"),
    ("bias and softcap", f"c = Attention<is_causal = 1, softcap = 1.5>(qh, gh, gh, bias, , , all)\n {TOGETHER}"),
    ("heads not split", "logits = Attention<is_causal = 1, q_num_heads = 2, kv_num_heads = 1>(q, g, g, , , , all)"),
    ("keys in use", f"c0, p, = Attention<is_causal = 1>(qh, kh, kh)\n c = Add(c0, p)\n {TOGETHER}".replace("p, =", "p =")),
]  # fmt: skip


@pytest.mark.parametrize("body", [pytest.param(body, id=title) for title, body in ATTENTION])
def test_attention_with_more_inputs_or_outputs_computes_the_same(body):
    original = in_order(read(STANDARD.replace("BODY", body), opset=24))
    whole = texts(original)
    decomposed = io.to_proto(decompose(Subject.of(original).model).model)
    found, expected = (in_onnxruntime(one)(whole)["logits"] for one in (decomposed, original))
    assert difference(found, expected) < 1e-5
    assert_law(original, injected(original), whole)


@pytest.mark.parametrize(
    ("body", "reason"),
    [(f"c = Attention<is_causal = 1>(qh, kh, kh, , , , counted)\n {TOGETHER}", "depend on the total length"),
     (f"c, , , w = Attention<is_causal = 1, qk_matmul_output_mode = 3>(qh, kh, kh)\n m = ReduceMax(w)\n c1 = Mul(c, m)\n {TOGETHER.replace('(c)', '(c1)')}", "further outputs are used")],
    ids=["sequence lengths", "weights"],
)  # fmt: skip
def test_unsupported_attention_inputs_and_outputs_are_rejected(body, reason):
    with pytest.raises(UnsupportedError, match=reason):
        injected(in_order(read(STANDARD.replace("BODY", body), opset=24)))
