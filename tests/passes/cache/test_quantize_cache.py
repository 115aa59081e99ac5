"""A quantized cache holds integers of each row and its scale, and the split into calls does not change the result."""

from __future__ import annotations

import functools
import re

import numpy as np
import onnx
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import after
from laws import Arrays, dims_of, in_onnxruntime, texts
from recurrences import CONVOLUTION
from unrolled import unrolled
from written import read

from kvsurgeon import io
from kvsurgeon.errors import ParityError, UnsupportedError
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.cache.quantize_cache import QuantizeCache
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.contract import CACHE_TOKENS, Subject, Unchanged
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

BITS = (8, 4)
LARGEST = {8: 127, 4: 7}
CACHES = (
    "inject",
    "inject{cache=static}",
    "inject{cache=new-tokens,past-length=input}",
    "inject{key-layout=kv_heads,batch,head_dim,sequence}",
)


@functools.cache
def original(dtype: str = "float32") -> onnx.ModelProto:
    return Decoder(Config(layers=2, windowed=(1,), dtype=dtype)).model()


@functools.cache
def quantized(bits: int, inject: str = CACHES[0], dtype: str = "float32") -> onnx.ModelProto:
    return io.to_proto(Pipeline.parse(f"{inject},quantize-cache{{bits={bits}}}").run(original(dtype)).model)


def first_call(model: onnx.ModelProto, inputs: Arrays) -> Arrays:
    sizes = {"batch_size": len(next(iter(inputs.values()))), "past_sequence_length": 0}
    pasts = {
        value.name: np.zeros([sizes.get(size, size) for size in dims_of(value)], dtype_of(value))
        for value in model.graph.input
        if value.name not in inputs
    }
    return in_onnxruntime(model)({**inputs, **pasts})


def dtype_of(value: onnx.ValueInfoProto) -> np.dtype:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)


def unpacked(integers: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return integers.astype(np.int64)
    return np.concatenate([integers & 15, integers >> 4], axis=-1).astype(np.int64) - 8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["key", "value"])
def test_integers_and_scales_are_those_of_the_rows(bits, kind):
    inputs = texts(original())
    rows = first_call(after(original(), Inject()), inputs)[f"present.0.{kind}"]
    found = first_call(quantized(bits), inputs)
    scale = np.abs(rows).max(axis=-1, keepdims=True) / np.float32(LARGEST[bits])
    assert np.array_equal(found[f"present.0.{kind}_scale"], scale)
    assert np.array_equal(unpacked(found[f"present.0.{kind}"], bits), np.round(rows / scale))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("bits", BITS)
def test_all_rows_are_read_from_the_cache_so_the_split_into_calls_does_not_matter(bits, cache):
    model = quantized(bits, cache)
    report = verify(after(model, RemoveCache()), model, effort="quick", seed=3)
    assert report.verdict == "same", report.problems
    if bits == 8:  # compared without rounding
        assert report.error < 1e-4


def test_a_cache_of_8_bits_is_verified_with_a_tolerance_of_its_own():
    report = verify(original(), quantized(8), effort="quick", seed=3)
    assert (report.verdict, report.arithmetic) == ("same", "quantized")


def test_a_cache_of_4_bits_is_not_verified_against_the_original():
    report = verify(original(), quantized(4), effort="quick", seed=3)
    assert report.verdict == "unknown"
    assert "4 bits" in report.unverifiable


@pytest.mark.parametrize("bits", BITS)
def test_scales_of_other_rows_are_found(bits):
    wrong = onnx.ModelProto.FromString(quantized(bits).SerializeToString())
    reads = [node for node in wrong.graph.node if node.op_type == "Mul" and "present.0.key_scale" in node.input]
    assert len(reads) == 1
    reads[0].input[list(reads[0].input).index("present.0.key_scale")] = "present.0.value_scale"
    assert verify(original(), wrong, effort="quick", seed=3).verdict != "same"
    assert verify(after(quantized(bits), RemoveCache()), wrong, effort="quick", seed=3).verdict == "different"


def test_new_rows_that_are_read_in_floats_are_found():
    wrong = onnx.ModelProto.FromString(quantized(4).SerializeToString())
    made = {node.output[0]: node for node in wrong.graph.node}
    scale = made["present.0.key_scale"].input[1]
    (source,) = (node.input[0] for node in made.values() if node.op_type == "Div" and node.input[1] == scale)
    (wide,) = (name for name, node in made.items() if node.op_type == "Mul" and "present.0.key_scale" in node.input)
    for node in wrong.graph.node:
        node.input[:] = [f"{wide}.mixed" if name == wide else name for name in node.input]
    nodes = [
        onnx.helper.make_node("Shape", ["past_key_values.0.key"], ["past_sizes"], start=2, end=3),
        onnx.helper.make_node("Slice", [wide, "from", "past_sizes", "along"], ["past_rows"]),
        onnx.helper.make_node("Concat", ["past_rows", source], [f"{wide}.mixed"], axis=2),
    ]
    index = next(index for index, node in enumerate(wrong.graph.node) if wide in node.output)
    for node in nodes[::-1]:
        wrong.graph.node.insert(index + 1, node)
    for name, number in (("from", 0), ("along", 2)):
        wrong.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    report = verify(after(quantized(4), RemoveCache()), wrong, effort="quick", seed=3)
    assert report.verdict == "different"


def test_rows_that_keys_are_computed_from_stay_those_of_a_state():
    convolution = re.sub(r"\bx\b", "k0", re.sub(r"\bh\b", "k", CONVOLUTION))
    model = read(attention(key=convolution, constants="float[8, 1, 3] kernel"))
    found = after(model, Inject(), QuantizeCache())
    kinds = {one.kind: str(one.dtype) for one in Subject.of(found).cache()}
    scales = {"key_scale": "float32", "value_scale": "float32"}
    assert kinds == {"key": "int8", "value": "int8", "conv_state": "float32", **scales}


def test_a_cache_of_states_alone_is_unchanged():
    _, step = Pipeline.parse("inject,quantize-cache").run(unrolled()).steps
    assert step.outcome == Unchanged(reason="the cache has no keys and values")


def test_a_row_of_zeros_stays_a_row_of_zeros():
    model = onnx.ModelProto.FromString(original().SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.name in ("layers.0.key", "layers.1.value"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(0 * onnx.numpy_helper.to_array(tensor), tensor.name))
    found = first_call(io.to_proto(Pipeline.parse("inject,quantize-cache").run(model).model), texts(model))
    assert np.isfinite(found["logits"]).all()


def test_the_loss_is_measured_and_the_size_of_the_cache_stated():
    run = run_and_save(original(), Pipeline([Inject(), QuantizeCache(bits=4)]), effort="quick", seed=1)
    assert not run.exact
    assert run.loss is not None
    assert run.cache_bytes == (256 * CACHE_TOKENS, 64 * CACHE_TOKENS)


@pytest.mark.parametrize("before", ["", "raise-opset{opset=23},fuse-attention{operator=attention,layers=supported},"])
def test_a_rotation_is_verified_against_the_model_before(before):
    run = Pipeline.parse(f"{before}inject,quantize-cache{{bits=4,hadamard=true}}").run(original())
    assert run.changes[-1].equal_models is not None
    (plain, rotated), _ = run.changes[-1].equal_models()
    report = verify(io.to_proto(plain), io.to_proto(rotated), effort="quick", seed=3)
    assert report.verdict == "same"
    assert report.error > 0  # not the same graph


def test_a_wrong_rotation_is_found(monkeypatch):
    monkeypatch.setattr("kvsurgeon.heads.hadamard.hadamard", lambda size: [2 * np.eye(size)] * 2)
    with pytest.raises(ParityError, match="differ from those of the original graph"):
        run_and_save(original(), Pipeline([Inject(), QuantizeCache(hadamard=True)]), effort="quick", seed=1)


def test_scales_of_a_float16_model_are_float32():
    model = quantized(8, dtype="float16")
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert types["past_key_values.1.value_scale"] == onnx.TensorProto.FLOAT
    assert verify(original("float16"), model, effort="quick", seed=3).verdict == "same"


def test_passes_that_restore_a_cache_come_before():
    with pytest.raises(UnsupportedError, match=r"found integers and scales .* .run quantize-cache after this pass"):
        Pipeline.parse("merge-kv-heads{kv-heads=1}").run(quantized(8))
