"""fuse-attention replaces each attention by one operator, or rejects the model if that computes something else."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import NAMES, after, export, operators
from laws import ALLOWED, difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.fuse_attention import FuseAttention
from kvsurgeon.passes.opset.raise_opset import RaiseOpset
from kvsurgeon.runtime import CachedDecoder, open_session
from kvsurgeon.workflow.verification import verify_models

FUSABLE = ["decoder", *(name for name in NAMES if name.startswith(("gemma2", "llama")))]  # head_dim 8


@functools.cache
def fused(name: str, cache: str) -> onnx.ModelProto:
    return after(export(name), Inject(cache=cache), FuseAttention())


def layers(name: str) -> int:
    return sum("key" in value.name for value in fused(name, "dynamic").graph.output)


# Results are unchanged


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FUSABLE)
def test_fused_exports_pass_verification(name, cache):
    result = fused(name, cache)
    found = operators(result)
    assert found.count("GroupQueryAttention") == layers(name) > 0
    assert not {"Softmax", "TensorScatter", "ScatterElements"} & set(found)
    report = verify(export(name), result, threads=1)
    assert report.verdict == "same", report


WAYS = {
    "scores divided": {"scores": "s = Div(s0, two)", "constants": "float two = {2.0}"},
    "queries scaled, and scores again": {"query": "q = Mul(q0, half)", "scores": "s = Mul(half, s0)"},
    "keys scaled": {"key": "k = Mul(k0, half)"},
    "scores capped": {
        "scores": "a = Div(s0, three) t = Tanh(a) b = Mul(t, three) s = Mul(b, half)",
        "constants": "float three = {3.0}",
    },
    "a mask that is added": {"masked": "gone = Where(allowed, none, low) masked_scores = Add(gone, s)",
                             "constants": "float none = {0.0}"},
    "a mask that is subtracted": {"masked": "gone = Where(allowed, none, high) masked_scores = Sub(s, gone)",
                                  "constants": "float none = {0.0}, float high = {30000.0}"},
    "a mask of zeros and ones": {
        "masked": "seen = Cast<to = 1>(allowed) kept = Mul(s, seen) hidden = Sub(seen, whole)\n"
                  "  gone = Mul(hidden, high) masked_scores = Add(kept, gone)",
        "constants": "float whole = {1.0}, float high = {30000.0}",
    },
    "a bias by distance, scaled with the scores": {
        "scores": "far = Sub(row, column) steps = Cast<to = 1>(far) added = Add(s0, steps) s = Mul(added, half)",
    },
    "a window": {"allowed": "past = LessOrEqual(row, column) far = Sub(column, row) near = Less(far, three)\n"
                            "  allowed = And(past, near)", "constants": "int64 three = {3}"},
    "axes that are moved": {
        "masked": "one_head = Unsqueeze(s, second) out = Where(allowed, one_head, low)\n"
                  "  masked_scores = Squeeze(out, second)",
    },
    "a bias before axes are moved": {
        "scores": "far = Sub(row, column) steps = Cast<to = 1>(far) biased = Add(s0, steps)\n"
                  "  apart = Unsqueeze(biased, first) s = Squeeze(apart, first)",
    },
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_scores_can_be_scaled_capped_and_masked_in_any_order(way):
    model = read(attention(**WAYS[way]), 18)
    result = after(model, Inject(cache="static"), FuseAttention())
    assert operators(result).count("GroupQueryAttention") == 1
    assert "Softmax" not in operators(result)
    report = verify(model, result, threads=1)
    assert report.verdict == "same", report


@pytest.mark.parametrize(
    "zeros", ["zeros = Identity(none)", "sizes_of = Shape(w) zeros = ConstantOfShape<value = float[1] {0.0}>(sizes_of)"]
)
def test_a_nan_guard_is_part_of_the_match(zeros):
    text = attention(masked="masked_scores = Where(allowed, s, low)").replace(
        "c = MatMul(w, v)", f"bad = IsNaN(w) {zeros} w0 = Where(bad, zeros, w) c = MatMul(w0, v)"
    )
    model = read(text.replace("float half", "float none = {0.0}, float half"), 18)
    assert verify(model, after(model, Inject(), FuseAttention()), threads=1).verdict == "same"


SEQUENCE_FIRST = "Transpose<perm = [1, 0, 2]>"


def test_the_sequence_axis_can_precede_the_batch_axis():
    text = attention(
        hidden=f"h = {SEQUENCE_FIRST}(x)",
        query=f"q = {SEQUENCE_FIRST}(q0)",
        key=f"k = {SEQUENCE_FIRST}(k0)",
        value=f"v = {SEQUENCE_FIRST}(v0)",
        after=f"t = {SEQUENCE_FIRST}(c) p = MatMul(t, wv) logits = {SEQUENCE_FIRST}(p)",
    )
    model = read(text, 18)
    for cache in ("dynamic", "static"):
        assert verify(model, after(model, Inject(cache=cache), FuseAttention()), threads=1).verdict == "same"


# Unsupported attention

OTHERS = {
    "squashed": ({"scores": "s = Sigmoid(s0)"}, "an operator that no fused attention operator has"),
    "capped late": (
        {"masked": "moved = Add(s, half) t = Tanh(moved) masked_scores = Where(allowed, t, low)"},
        "capped after a mask or bias",
    ),
    "multiplied by place": (
        {"scores": "steps = Cast<to = 1>(row) s = Mul(s0, steps)"}, "differs from what the fused operator computes",
    ),
    "added to by tokens": (
        {"scores": "sums = ReduceSum<keepdims = 1>(q0, third) s = Add(s0, sums)"}, "depends on token data",
    ),
    "squared": ({"scores": "s = Mul(s0, s0)"}, "one reader|not constant"),
    "subtracted": ({"scores": "s = Sub(half, s0)"}, "subtracted from a value"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_other_scores_are_rejected(other):
    parts, reason = OTHERS[other]
    subject = Subject.of(read(attention(**parts), 18))
    before = io.to_proto(subject.model).SerializeToString()
    with pytest.raises(UnsupportedError, match=reason) as caught:
        FuseAttention().apply(subject)
    assert caught.value.layer == 0
    assert io.to_proto(subject.model).SerializeToString() == before


def test_weights_that_change_after_softmax_are_rejected():
    text = attention().replace("c = MatMul(w, v)", "w0 = Mul(w, half) c = MatMul(w0, v)")
    with pytest.raises(UnsupportedError, match="changed between softmax and context product"):
        FuseAttention().apply(Subject.of(read(text, 18)))


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(FUSABLE)))
def test_a_head_dim_without_a_kernel_is_rejected(name):
    with pytest.raises(UnsupportedError, match="does not support this head_dim; expected a multiple of 8, found 4"):
        FuseAttention().apply(Subject.of(export(name)))


def test_a_type_without_a_kernel_is_rejected():
    model = Decoder(Config(layers=1, dtype="float64")).model()
    with pytest.raises(
        UnsupportedError, match="has no fused kernel; expected float, float16 or bfloat16 for all, found double"
    ):
        FuseAttention().apply(Subject.of(model))


# Names, metadata and further passes


def test_fused_models_are_unchanged():
    for model in (fused("decoder", "static"), after(export("decoder"), FuseAttention())):
        assert isinstance(FuseAttention().apply(Subject.of(model)), Unchanged)


def test_cache_inputs_and_outputs_keep_names_and_order():
    inject = Inject(past="k_{kind}_{layer}", present="new_{kind}_{layer}", cache="static")
    cached = after(export("decoder"), inject)
    result = after(cached, FuseAttention())
    for before, now in ((cached.graph.input, result.graph.input), (cached.graph.output, result.graph.output)):
        assert sorted(value.name for value in before) == sorted(value.name for value in now)
        assert [v.name for v in before if "_key_" in v.name] == [v.name for v in now if "_key_" in v.name]


def test_the_past_length_can_come_from_the_attention_mask():
    result = after(export("decoder"), Inject(cache="static", past_length="mask"), FuseAttention())
    assert "past_sequence_length" not in {value.name for value in result.graph.input}
    assert verify(export("decoder"), result, threads=1).verdict == "same"


def test_unused_rows_of_a_static_cache_are_never_read():
    decoder = CachedDecoder(open_session(fused("decoder", "static"), threads=1))
    whole = texts(export("decoder"), batch=1, length=6)
    expected = in_onnxruntime(export("decoder"))(whole)["logits"]
    decoder.reset()
    for buffer in decoder.cache_manager.pasts(1, 0, 6).values():
        buffer.numpy()[:] = np.nan
    found = decoder.step(whole)
    assert difference(found, expected) <= ALLOWED["float32"]


def test_the_cache_of_fused_operators_can_be_removed():
    result = after(fused("decoder", "dynamic"), RemoveCache())
    assert verify_models(export("decoder"), result).verdict == "same"


# Without a cache


@pytest.mark.parametrize("name", FUSABLE)
def test_models_without_a_cache_can_be_fused(name):
    result = after(export(name), FuseAttention())
    assert operators(result).count("GroupQueryAttention") == layers(name)
    assert verify_models(export(name), result).verdict == "same"


@pytest.mark.parametrize("name", NAMES)
def test_onnx_attention_supports_any_head_dim(name):
    result = after(export(name), RaiseOpset(opset=24), FuseAttention(operator="attention"))
    assert "Attention" in operators(result)
    assert "Softmax" not in operators(result)
    assert verify_models(export(name), result).verdict == "same"


def test_a_cache_can_be_injected_around_onnx_attention():
    result = after(export("decoder"), RaiseOpset(opset=24), FuseAttention(operator="attention"), Inject(cache="static"))
    assert verify(export("decoder"), result, threads=1).verdict == "same"


def test_onnx_attention_can_be_fused_to_group_query_attention():
    standard = after(export("decoder"), RaiseOpset(opset=24), FuseAttention(operator="attention"))
    assert isinstance(FuseAttention(operator="attention").apply(Subject.of(standard)), Unchanged)
    result = after(standard, Inject(cache="static"), FuseAttention())
    assert "Attention" not in operators(result)
    assert verify(export("decoder"), result, threads=1).verdict == "same"


def test_onnx_attention_requires_opset_23():
    with pytest.raises(UnsupportedError, match="raise-opset first"):
        FuseAttention(operator="attention").apply(Subject.of(export("decoder")))


def test_layers_supported_fuses_only_supported_layers():
    second = """k1 = MatMul(c, wk) v1 = MatMul(c, wv) kt1 = Transpose<perm = [0, 2, 1]>(k1)
  s1 = MatMul(c, kt1) s2 = Sigmoid(s1) s3 = Where(allowed, s2, low) w1 = Softmax<axis = -1>(s3)
  logits = MatMul(w1, v1)"""
    text = attention(after=second)
    model = read(text, 18)
    with pytest.raises(UnsupportedError, match="layer 1"):
        FuseAttention().apply(Subject.of(model))
    subject = Subject.of(after(model, Inject(cache="static")))
    outcome = FuseAttention(layers="supported").apply(subject)
    assert isinstance(outcome, Changed)
    assert [note for note in outcome.notes if note.startswith("not fused: layer 1")]
    result = io.to_proto(subject.model)
    assert operators(result).count("GroupQueryAttention") == operators(result).count("Softmax") == 1
    assert verify(model, result, threads=1).verdict == "same"
