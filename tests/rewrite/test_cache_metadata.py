"""Cache metadata: unknown fields are ignored, and names follow the inputs and outputs that are renamed."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
from attentions import attention
from decoders import Config, Decoder
from written import read

from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.rewrite.cache_metadata import CONTEXT_KEY, FIRST_CALL_KEY, KEY, read_cache_metadata, rename_in_metadata
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.run_and_save import run_and_save

STATED = "causal = LessOrEqual(row, column)\n open = Less(row, z)\n allowed = Or(causal, open)"


@pytest.fixture
def cached():
    subject = Subject.of(Decoder(Config()).model())
    Inject(cache="static", max_length=64).apply(subject)
    return subject.model


def test_an_unknown_field_is_ignored(cached):
    known = read_cache_metadata(cached)
    cached.metadata_props[KEY] = json.dumps({**json.loads(cached.metadata_props[KEY]), "later": [1]})
    assert read_cache_metadata(cached) == known
    assert known.mode == "static"


@pytest.mark.parametrize("change", [{"key_layout": None}, {"mode": ...}, {"value_layout": 3}])
def test_metadata_without_a_required_field_is_none(cached, change):
    stored = json.loads(cached.metadata_props[KEY])
    for name, value in change.items():
        stored.pop(name) if value is ... else stored.update({name: value})
    cached.metadata_props[KEY] = json.dumps(stored)
    assert read_cache_metadata(cached) is None


@pytest.mark.parametrize("text", ["", "[1]", "3", "{"])
def test_metadata_that_is_no_mapping_is_none_and_stays(cached, text):
    cached.metadata_props.update({KEY: text, FIRST_CALL_KEY: text, CONTEXT_KEY: text})
    before = dict(cached.metadata_props)
    assert read_cache_metadata(cached) is None
    rename_in_metadata(cached, {"logits": "scores"})
    assert cached.metadata_props == before


def test_names_follow_those_of_the_outputs(cached):
    stored = {**json.loads(cached.metadata_props[KEY]), "later": [1], "outputs": {"logits": [1, 2], "mode": [3]}}
    cached.metadata_props[KEY] = json.dumps(stored)
    RenameIo(names=("logits:scores",)).apply(Subject(model=cached))
    expected = {**stored, "outputs": {"scores": [1, 2], "mode": [3]}}
    assert json.loads(cached.metadata_props[KEY]) == expected
    rename_in_metadata(cached, {"mode": "kind"})
    assert json.loads(cached.metadata_props[KEY]) == expected | {"outputs": {"scores": [1, 2], "kind": [3]}}


def test_names_of_inputs_that_an_application_computes_follow():
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    model.metadata_props[CONTEXT_KEY] = json.dumps({"places": 8, "inputs": {"a": {"kind": "mask"}, "places": {}}})
    rename_in_metadata(model, {"a": "b", "places": "c"})
    assert json.loads(model.metadata_props[CONTEXT_KEY]) == {"places": 8, "inputs": {"b": {"kind": "mask"}, "c": {}}}


def test_an_input_of_the_first_call_is_verified_under_its_new_name():
    pipeline = Pipeline((Inject(input=("z=first-call",)), RenameIo(names=("z:prefix",))))
    run = run_and_save(read(attention(inputs="int64 z", allowed=STATED)), pipeline, effort="quick", seed=0)
    assert run.verification.verdict == "same"
    assert list(json.loads(run.model.metadata_props[FIRST_CALL_KEY])) == ["prefix"]
