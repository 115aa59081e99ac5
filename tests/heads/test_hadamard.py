"""A Hadamard rotation of heads changes what a cache holds and nothing else."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  bfloat16 by name
import numpy as np
import onnx
import pytest
from attentions import attention
from decoders import Config, Decoder
from exports import ONE_OF_EACH, after, export
from laws import difference, in_onnxruntime, texts
from written import read

from kvsurgeon import io
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.heads.hadamard import hadamard, rotate_heads
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.heads.share_kv_layers import ShareKvLayers


def rotated(model: onnx.ModelProto) -> onnx.ModelProto:
    subject = Subject.of(model)
    subject.model = copy_model(subject.model)
    rotate_heads(subject.analysis())
    return io.to_proto(subject.decomposed().model)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2, 8, 24, 64, 128, 256])
def test_the_product_of_both_matrices_is_the_identity(size, dtype):
    rows, others = (matrix.astype(dtype).astype("float64") for matrix in hadamard(size))
    assert np.array_equal(rows, rows.T)
    assert np.array_equal(others, others.T)
    assert np.array_equal(rows @ others, np.eye(size))


def test_the_model_computes_the_same():
    model = Decoder(Config(head_dim=24)).model()
    inputs = texts(model)
    found, expected = (in_onnxruntime(one)(inputs)["logits"] for one in (rotated(model), model))
    assert difference(found, expected, inputs["attention_mask"]) < 1e-5


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_exports_compute_the_same(name):
    model = export(name)
    inputs = texts(model)
    found, expected = (in_onnxruntime(one)(inputs)["logits"] for one in (rotated(model), model))
    assert difference(found, expected, inputs.get("attention_mask")) < 1e-4


TWO_SCORES = {
    "key": "k = Tanh(k0)\n  k1 = Transpose<perm = [0, 2, 1]>(k0)",
    "scores": "s1 = MatMul(q0, k1)\n  s = Add(s0, s1)",
}
TWO_VALUES = {"value": "v = Tanh(v0)\n  v1 = Neg(v0)", "after": "d = MatMul(w, v1)\n  logits = Add(c, d)"}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"after": "logits = Add(c, k)"}, "keys and values that only attention reads"),
        (TWO_SCORES, "one product of queries with keys"),
        (TWO_VALUES, "one product of queries with keys"),
    ],
    ids=["keys are read elsewhere", "two products with keys", "two products with values"],
)
def test_rejects_what_would_change(case, message):
    with pytest.raises(UnsupportedError, match=message):
        rotated(read(attention(**case), 18))


def test_keys_that_a_further_output_returns_are_not_rotated():
    model = read(attention(), 18)
    model.graph.output.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, ["b", "n", 8]))
    with pytest.raises(UnsupportedError, match="keys and values that only attention reads"):
        rotated(model)


def test_layers_that_share_a_cache_rotate_it_once():
    model = Decoder(Config(layers=2)).model()
    shared = after(model, ShareKvLayers(kv_layers=1, method="first"))
    inputs = texts(model)
    found, expected = (in_onnxruntime(one)(inputs)["logits"] for one in (rotated(shared), shared))
    assert difference(found, expected, inputs["attention_mask"]) < 1e-5
