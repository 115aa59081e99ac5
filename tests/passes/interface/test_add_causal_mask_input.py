"""A causal mask input hides, in addition to the attention mask, what its last query does not attend to."""

from __future__ import annotations

import numpy as np
import pytest
from exports import ONE_OF_EACH, after, export, injected
from laws import in_onnxruntime
from written import read

from kvsurgeon import io
from kvsurgeon.ops.content import depends_on_input
from kvsurgeon.parity import verify
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.interface.add_causal_mask_input import AddCausalMaskInput
from kvsurgeon.workflow.verification import verify_models


def masked(name):
    """An export with a cache and the mask, and the original."""
    original = export(name)
    subject = Subject.of(original)
    Inject().apply(subject)
    outcome = AddCausalMaskInput().apply(subject)
    return original, subject, outcome


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_verification_finds_no_difference(name):
    original, subject, outcome = masked(name)
    if isinstance(outcome, Unchanged):
        assert "attention_mask" in outcome.reason
        return
    result = io.to_proto(subject.model)
    (given,) = (value for value in result.graph.input if value.name == "causal_mask")
    dims = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert dims == ["batch_size", 1, "sequence_length", "total_sequence_length"]
    assert verify(original, result).verdict == "same"
    assert isinstance(AddCausalMaskInput().apply(subject), Unchanged)


@pytest.mark.parametrize("cache", ["dynamic", "static", "new-tokens"])
def test_verification_does_not_take_the_mask_for_a_past(cache):
    before = injected(export("gpt2_torchscript_sdpa"), cache=cache)
    report = verify_models(before, after(before, AddCausalMaskInput()))
    assert (report.verdict, report.unverifiable) == ("same", None)


SCORES = """case (float[batch_size, sequence_length, 8] x, int64[batch_size, total_sequence_length] attention_mask,
 float[batch_size, 1, past_sequence_length, 8] past) => (float[batch_size, 1, sequence_length, sequence_length] w)
<int64 zero = {{0}}, int64 step = {{1}}, int64 at = {{1}}, int64[1] column = {{1}}, int64[1] one = {{1}},
 float low = {{-9.0}}>
{{
  q = Unsqueeze(x, one) k = Transpose<perm = [0, 1, 3, 2]>(q) s = MatMul(q, k) shape = Shape(x)
  n = Gather(shape, at) keys = Range(zero, n, step) queries = Unsqueeze(keys, column)
  hidden = Less(queries, keys) seen = Not(hidden)
  {masked}
  w = Softmax<axis = -1>(m)
  unused = Identity(attention_mask)
}}"""
MASKED = {
    "kept": "m = Where(seen, s, low)",
    "hidden": "m = Where(hidden, low, s)",
    "added": "h = Cast<to = 1>(hidden) a = Mul(h, low) m = Add(s, a)",
    "added with infinity": "h = Cast<to = 1>(seen) a = Log(h) m = Add(a, s)",
}


@pytest.mark.parametrize("masked", MASKED.values(), ids=MASKED)
def test_context_of_scores_depends_on_an_input_and_keeps_its_value(masked):
    model = read(SCORES.format(masked=masked), 17)
    subject = Subject.of(model)
    assert isinstance(AddCausalMaskInput().apply(subject), Changed)
    scores = next(node for node in subject.model.graph if node.op_type == "Softmax").inputs[0].producer()
    added = {value for value in scores.inputs if value.producer() and value.producer().op_type != "MatMul"}
    assert [value for value in added if not depends_on_input(value)] == []
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32),
             "attention_mask": np.ones((1, 4), np.int64), "past": np.zeros((1, 1, 0, 8), np.float32)}  # fmt: skip
    expected = in_onnxruntime(model)(feeds)["w"]
    for causal in (np.tri(4, dtype=np.int64), np.zeros((4, 4), np.int64)):
        found = in_onnxruntime(io.to_proto(subject.model))(feeds | {"causal_mask": causal[None, None]})["w"]
        np.testing.assert_array_equal(found, expected)


TEXT = """case (int64[batch_size, sequence_length] input_ids, {dtype}[batch_size, total_sequence_length] attention_mask)
=> ({dtype}[batch_size, total_sequence_length] visible) {{ visible = Identity(attention_mask) }}"""


@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_a_token_counts_if_both_masks_mark_it(dtype):
    subject = Subject.of(read(TEXT.format(dtype=dtype), 17))
    assert isinstance(AddCausalMaskInput().apply(subject), Changed)
    mask = np.array([[0, 1, 1, 1, 1]], dtype=dtype)
    causal = np.tri(2, 5, 3, dtype=np.int64)[None, None]
    causal[..., :2] = 0
    feeds = {"input_ids": np.zeros((1, 2), np.int64), "attention_mask": mask, "causal_mask": causal}
    feeds = {value.name: feeds[value.name] for value in subject.model.graph.inputs}
    found = in_onnxruntime(io.to_proto(subject.model))(feeds)["visible"]
    assert found.tolist() == [[0, 0, 1, 1, 1]]
    assert found.dtype == dtype


@pytest.mark.parametrize("dtype", ["float", "bool"])
def test_a_mask_of_another_type_is_unchanged(dtype):
    assert isinstance(AddCausalMaskInput().apply(Subject.of(read(TEXT.format(dtype=dtype), 17))), Unchanged)
