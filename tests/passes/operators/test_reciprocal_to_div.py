"""reciprocal-to-div replaces `x * (1 / y)` by `x / y`, and nothing else."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from exports import export
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.reciprocal_to_div import ReciprocalToDiv
from kvsurgeon.workflow.verification import verify_models

TEXT = """case (float[n, 4] x, float[n, 4] z) => (float[n, 4] y{outputs}) {{
  r = Sqrt(x)
  i = Reciprocal(r)
  {product}
}}"""

PRODUCTS = {
    "y = Mul(x, i)": ["Sqrt", "Div"],
    "y = Mul(i, x)": ["Sqrt", "Div"],
    "j = Reciprocal(z) y = Mul(i, j)": ["Sqrt", "Reciprocal", "Div"],
    "y = Mul(i, i)": ["Sqrt", "Reciprocal", "Div"],
    "a = Mul(x, i) b = Mul(z, i) y = Add(a, b)": ["Sqrt", "Div", "Div", "Add"],
    "m = Mul(x, i) y = Add(m, i)": ["Sqrt", "Reciprocal", "Div", "Add"],
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_become_divisions(product):
    model = read(TEXT.format(product=product, outputs=""), 18)
    subject = Subject.of(model)
    assert isinstance(ReciprocalToDiv().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert sorted(node.op_type for node in result.graph.node) == sorted(PRODUCTS[product])
    feeds = {name: np.random.default_rng(0).uniform(0.5, 3, (3, 4)).astype(np.float32) for name in ("x", "z")}
    expected, found = (in_onnxruntime(one)(feeds)["y"] for one in (model, result))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert isinstance(ReciprocalToDiv().apply(subject), Unchanged)


@pytest.mark.parametrize("product", ["y = Add(x, i)", "y = Div(i, x)", "y = Mul(x, z)"])
def test_other_products_and_sums_are_unchanged(product):
    subject = Subject.of(read(TEXT.format(product=product, outputs=""), 18))
    assert isinstance(ReciprocalToDiv().apply(subject), Unchanged)


def test_a_reciprocal_that_is_an_output_keeps_its_name():
    subject = Subject.of(read(TEXT.format(product="y = Mul(x, i)", outputs=", float[n, 4] i"), 18))
    assert isinstance(ReciprocalToDiv().apply(subject), Changed)
    assert [value.name for value in subject.model.graph.outputs] == ["y", "i"]


def test_onnxruntime_fuses_the_norm_afterwards(tmp_path):
    subject = Subject.of(export("llama_dynamo_sdpa"))
    assert isinstance(ReciprocalToDiv().apply(subject), Changed)
    result = io.to_proto(subject.model)
    assert verify_models(export("llama_dynamo_sdpa"), result).verdict == "same"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(result.SerializeToString(), options, ["CPUExecutionProvider"])
    assert b"SimplifiedLayerNormalization" in (tmp_path / "optimized.onnx").read_bytes()
