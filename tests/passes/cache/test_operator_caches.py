"""Caches of fused operators: removed, restored or changed, the model computes the same."""

import onnx
import pytest
from exports import injected
from laws import assert_law, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.passes.cache.remove_cache import RemoveCache, detach_cache, reattach_cache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject
from kvsurgeon.workflow.verification import verify_models

TEXT = """case (int64[b, s] x, int64[b, t] attention_mask, PASTS) => (float[b, s, 64] logits, PRESENTS)
<float[16, 32] table, float[32, 64] wq, float[32, 32] wk, float[32, 32] wv, float[32, 128] wqkv, int64 one = {1},
 int64[1] second = {1}, float[64, 8] cos, float[64, 8] sin, float[64, 64] wo, float[32, 192] w, float[192] bias,
 int64[4] apart = {0, 0, -1, 16}, int64[3] flat = {0, 0, -1}>
{
  counted = ReduceSum<keepdims = 0>(attention_mask, second)
  before = Sub(counted, one)
  ends = Cast<to = 6>(before)
  sizes = Shape(attention_mask)
  length = Gather(sizes, one)
  total = Cast<to = 6>(length)
  h = Gather(table, x)
  q = MatMul(h, wq)
  k = MatMul(h, wk)
  v = MatMul(h, wv)
  qkv = MatMul(h, wqkv)
  more = MatMul(q, wo)
  q4 = Reshape(q, apart)
  k4 = Reshape(k, apart)
  v4 = Reshape(v, apart)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  BODY
}"""
GROUPED = "com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2, do_rotary = 1>"
SEVERAL = "com.microsoft.MultiHeadAttention<num_heads = 4, unidirectional = 1>"
STANDARD = "Attention<q_num_heads = 4, kv_num_heads = 2, is_causal = 1>"
IN_HEADS = "c, present_k, present_v = Attention<is_causal = 1, softcap = 3.0>(qh, kh, vh, , past_k, past_v)"
CASES = [
    ("apart", 2, f"logits, present_k, present_v = {GROUPED}(q, k, v, past_k, past_v, ends, total, cos, sin)"),
    ("packed", 2, f"logits, present_k, present_v = {GROUPED}(qkv, , , past_k, past_v, ends, total, cos, sin)"),
    ("of as many heads", 4, f"logits, present_k, present_v = {SEVERAL}(q, q, more, , , , past_k, past_v)"),
    ("with a bias", 4, f"logits, present_k, present_v = {SEVERAL}(q, q, more, bias, , , past_k, past_v)"),
    (
        "projecting",
        4,
        "logits, present = com.microsoft.Attention<num_heads = 4, unidirectional = 1>(h, w, bias, , past)",
    ),
    ("standard", 2, f"logits, present_k, present_v = {STANDARD}(q, k, v, , past_k, past_v)"),
    ("standard in heads", 2, f"{IN_HEADS}\n ct = Transpose<perm = [0, 2, 1, 3]>(c)\n logits = Reshape(ct, flat)"),
]
WIDTHS = ["16", "width"]  # as numbers, or by a name that says nothing


def with_cache(heads: int, body: str, width: str = "16") -> onnx.ModelProto:
    def dim_names(kind: str, length: str) -> str:
        if "present =" in body:
            return f"float[2, b, {heads}, {length}, {width}] {kind}"
        return ", ".join(f"float[b, {heads}, {length}, {width}] {kind}_{part}" for part in "kv")

    text = TEXT.replace("PASTS", dim_names("past", "past_sequence_length")).replace(
        "PRESENTS", dim_names("present", "t")
    )
    return read(text.replace("BODY", body), opset=23 if " Attention<" in body else 18)


@pytest.fixture(params=[pytest.param(case, id=title) for title, *case in CASES])
def case(request):
    return request.param


@pytest.mark.parametrize("width", WIDTHS)
def test_the_model_without_the_cache_is_the_same(case, width):
    original = with_cache(*case, width)
    subject = Subject.of(original)
    assert isinstance(RemoveCache().apply(subject), Changed)
    removed = io.to_proto(subject.model)
    assert [value.name for value in removed.graph.input] == ["x", "attention_mask"]
    assert verify_models(original, removed).verdict == "same"
    assert_law(removed, injected(removed), texts(removed, padded=False))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_model_with_another_cache_is_the_same(case, width):
    original = with_cache(*case, width)
    subject = Subject.of(original)
    assert isinstance(Retarget().apply(subject), Changed)
    found = io.to_proto(subject.model)
    assert not any(node.domain for node in found.graph.node)
    onnx.checker.check_model(found)
    assert verify_models(original, found).verdict == "same"


@pytest.mark.parametrize("seed", [1, 4])
@pytest.mark.parametrize("case", [case for _, *case in CASES[:2]])
def test_errors_of_calls_of_one_token_are_measured_by_the_spread_of_all(case, seed):
    original = with_cache(*case)
    subject = Subject.of(original)
    Retarget().apply(subject)
    assert verify_models(original, io.to_proto(subject.model), seed=seed).verdict == "same"


@pytest.mark.parametrize("case", [pytest.param(case, id=title) for title, *case in CASES if title != "projecting"])
def test_a_restored_cache_has_the_same_names(case):
    subject = Subject.of(with_cache(*case))
    signature = detach_cache(subject)
    assert [(entry.layer, entry.kind) for entry in signature.entries] == [(0, "key"), (0, "value")]
    reattach_cache(subject, signature)
    assert [value.name for value in subject.model.graph.inputs][2:] == ["past_k", "past_v"]
    assert [value.name for value in subject.model.graph.outputs][1:] == ["present_k", "present_v"]


def test_keys_and_values_in_one_tensor_cannot_be_restored():
    with pytest.raises(UnsupportedError, match="cannot be restored"):
        detach_cache(Subject.of(with_cache(*next(case for title, *case in CASES if title == "projecting"))))


BUFFERS = """case (int64[b, s] x, NUMBER past_length, float[b, 2, max_length, 16] past_k,
 float[b, 2, max_length, 16] past_v)
 => (float[b, s, 32] logits, float[b, 2, max_length, 16] present_k, float[b, 2, max_length, 16] present_v)
<float[16, 32] table, float[32, 32] wq, float[32, 32] wk, float[32, 32] wv, int64[1] second = {1}, int64[1] first = {0},
 int64[4] apart = {0, 0, -1, 16}, int64[3] flat = {0, 0, -1}>
{
  h = Gather(table, x)
  sizes = Shape(x)
  new = Gather(sizes, second)
  texts = Gather(sizes, first)
  q = MatMul(h, wq)
  k = MatMul(h, wk)
  v = MatMul(h, wv)
  q4 = Reshape(q, apart)
  k4 = Reshape(k, apart)
  v4 = Reshape(v, apart)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  places = Expand(past_length, texts)
  present_k = TensorScatter<axis = 2>(past_k, kh, places)
  present_v = TensorScatter<axis = 2>(past_v, vh, places)
  all = Add(places, new)
  c = Attention<is_causal = 1>(qh, present_k, present_v, , , , all)
  ct = Transpose<perm = [0, 2, 1, 3]>(c)
  logits = Reshape(ct, flat)
}"""


@pytest.mark.parametrize("number", ["int64[1]", "int64[b]"])
def test_buffers_with_a_number_of_filled_rows(number):
    original = read(BUFFERS.replace("NUMBER", number), opset=24)
    subject = Subject.of(original)
    assert isinstance(RemoveCache().apply(subject), Changed)
    removed = io.to_proto(subject.model)
    assert verify_models(original, removed).verdict == "same"
    assert_law(removed, injected(removed))
    other = Subject.of(original)
    Retarget().apply(other)
    assert verify_models(original, io.to_proto(other.model)).verdict == "same"


@pytest.mark.parametrize("present", ["window_length", "another_length"])
def test_a_sliding_window_cache_is_a_sliding_window_without_a_cache(present):
    body = f"logits, present_k, present_v = {GROUPED}(qkv, , , past_k, past_v, ends, total, cos, sin)"
    kept = "local_window_size = 4, sliding_window_cache = 1>"
    original = with_cache(2, body.replace("do_rotary = 1>", f"do_rotary = 1, {kept}"))
    for values, name in ((original.graph.input[2:], "window_length"), (original.graph.output[1:], present)):
        for value in values:
            value.type.tensor_type.shape.dim[2].dim_param = name
    subject = Subject.of(original)
    assert isinstance(RemoveCache().apply(subject), Changed)
    removed = io.to_proto(subject.model)
    assert_law(removed, injected(removed), texts(removed, padded=False))
    assert verify_models(original, removed).verdict == "unknown"  # how to fill such a window is unknown
