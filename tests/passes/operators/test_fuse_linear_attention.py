"""Recurrences over chunks become `LinearAttention`, whose state `inject` passes from call to call."""

import numpy as np
import onnx
import pytest
from exports import injected
from laws import assert_law, dims_of, texts
from onnx import numpy_helper
from recurrences import hybrid, keyed_hybrid, keyed_scan, scan
from written import read

from kvsurgeon import io
from kvsurgeon.passes.cache.remove_cache import RemoveCache
from kvsurgeon.passes.cache.retarget import Retarget
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.operators.fuse_linear_attention import FuseLinearAttention
from kvsurgeon.workflow import verification

STATE = "past_key_values.0.recurrent_state"
FORMS = {
    "an added product": {},
    "nothing added": {"added": "Identity(y2)"},
    "values without the step": {"Mul(xv, dt4)": "Identity(xv)"},
    "keys and queries in place of each other": {
        "(kb, of_keys)": "(kr, of_keys)",
        "(kr, of_keys)\n xv": "(kb, of_keys)",
    },
    "the constant on the right": {"Mul(scales, xp)": "Mul(xp, scales)"},
}
LOOK_ALIKES = {
    "results that are scaled": {"added": "Mul(y2, tenth)"},
    "another product that is added": {"added": "Add(y2, xp)"},
}


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    subject = Subject.of(onnx.ModelProto.FromString(model.SerializeToString()))
    assert isinstance(FuseLinearAttention().apply(subject), Changed)
    model = io.to_proto(subject.model)
    assert [node.op_type for node in model.graph.node].count("LinearAttention") == 1
    assert not any(node.op_type in ("CumSum", "Pad") for node in model.graph.node)
    return model


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS.keys())
def test_a_recurrence_becomes_one_operator_with_a_state(changes):
    original = read(keyed_hybrid(keyed_scan(**changes)))
    model = injected(fused(original))
    assert {value.name: dims_of(value) for value in model.graph.input}[STATE] == ["batch_size", 2, 3, 4]
    for length, cuts in ((3, [1, 2]), (13, range(1, 13)), (9, [3])):
        assert_law(original, model, whole=texts(original, length=length), cuts=list(cuts))
    assert verification.verify_models(original, model).verdict == "same"


@pytest.mark.parametrize("scales", [(1e-3, 0.0), (5.0, 1.0)])
def test_what_is_added_counts_next_to_results_of_any_size(scales):
    original = read(keyed_hybrid(keyed_scan()))
    weight = next(one for one in original.graph.initializer if one.name == "scales")
    weight.CopyFrom(numpy_helper.from_array(np.array(scales, np.float32)[:, None], "scales"))
    assert verification.verify_models(original, injected(fused(original)), effort="quick").verdict == "same"


@pytest.mark.parametrize("changes", LOOK_ALIKES.values(), ids=LOOK_ALIKES.keys())
def test_other_recurrences_stay_as_they_are(changes):
    subject = Subject.of(read(keyed_hybrid(keyed_scan(**changes))))
    before = io.to_proto(subject.model).SerializeToString(deterministic=True)
    outcome = FuseLinearAttention().apply(subject)
    assert isinstance(outcome, Unchanged)
    assert io.to_proto(subject.model).SerializeToString(deterministic=True) == before


def test_a_recurrence_without_keys_stays_as_it_is():
    assert isinstance(FuseLinearAttention().apply(Subject.of(read(hybrid(scan())))), Unchanged)


@pytest.mark.parametrize("cache", ["static", "new-tokens"])
def test_the_state_of_the_operator_is_passed_on_in_each_cache_mode(cache):
    original = read(keyed_hybrid(keyed_scan()))
    model = injected(fused(original), cache=cache)
    assert STATE in [value.name for value in model.graph.input]
    assert verification.verify_models(original, model, effort="quick").verdict == "same"


def test_the_state_of_the_operator_is_removed_and_restored():
    original = read(keyed_hybrid(keyed_scan()))
    subject = Subject.of(injected(fused(original)))
    assert isinstance(Retarget(cache="static").apply(subject), Changed)
    assert verification.verify_models(original, io.to_proto(subject.model), effort="quick").verdict == "same"
    assert isinstance(RemoveCache().apply(subject), Changed)
    model = io.to_proto(subject.model)
    assert STATE not in [value.name for value in model.graph.input]
    assert verification.verify_models(original, model, effort="quick").verdict == "same"


def test_a_state_that_starts_with_other_numbers_is_no_recurrence():
    model = fused(read(keyed_hybrid(keyed_scan())))
    expand = next(node for node in model.graph.node if node.op_type == "Expand")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half_a_unit"))
    expand.input[0] = "half_a_unit"
    result = injected(model)
    assert STATE not in [value.name for value in result.graph.input]
    assert verification.verify_models(model, result, effort="quick").verdict == "same"
