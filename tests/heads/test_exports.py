"""KV head passes on real exports: exact ones keep the logits, and an analysis of the result finds the new counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from laws import difference, in_onnxruntime, texts

from kvsurgeon import io
from kvsurgeon.analysis.analysis import analyze
from kvsurgeon.heads.counts import counts_of
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.passes.heads.expand_gqa import ExpandGqa
from kvsurgeon.passes.heads.merge_kv_heads import MergeKvHeads
from kvsurgeon.passes.heads.replicate_kv_heads import ReplicateKvHeads
from kvsurgeon.passes.heads.share_kv_layers import ShareKvLayers

CORPUS = Path(__file__).parents[1] / "corpus"
EXPORTS = sorted(path.stem for path in CORPUS.glob("*.onnx"))
GROUPED = [name for name in EXPORTS if name.startswith(("llama", "gemma2"))]
SEVERAL = [name for name in EXPORTS if name not in GROUPED]


def load(name):
    return Subject.of(CORPUS / f"{name}.onnx")


def counts(model):
    analysis = analyze(model)
    return {one.kv_heads for one in (counts_of(analysis.flow, head) for head in analysis.sites)}


def entries(model):
    return len({site.keys[0].cache_point.value for site in analyze(model).sites})


def logits(proto):
    return in_onnxruntime(proto)(texts(proto))["logits"]


def elements(proto):
    return sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)


@pytest.mark.parametrize("name", GROUPED)
def test_expanding_is_exact(name):
    subject = load(name)
    before = logits(io.to_proto(subject.model))
    (kv_heads,) = counts(subject.model)

    outcome = ExpandGqa().apply(subject)

    after = io.to_proto(subject.model)
    onnx.checker.check_model(after)
    assert isinstance(outcome, Changed)
    assert outcome.exact
    assert kv_heads < 4
    assert counts(subject.model) == {4}
    assert difference(logits(after), before) < 1e-5
    assert isinstance(ExpandGqa().apply(subject), Unchanged)


@pytest.mark.parametrize("name", EXPORTS)
def test_merging_replicated_heads_restores_the_original(name):
    subject = load(name)
    if name not in GROUPED:
        MergeKvHeads(kv_heads=2).apply(subject)
    before = logits(io.to_proto(subject.model))
    assert counts(subject.model) == {2}

    ReplicateKvHeads(repeat=2).apply(subject)
    assert counts(subject.model) == {4}
    assert difference(logits(io.to_proto(subject.model)), before) < 1e-5
    outcome = MergeKvHeads(kv_heads=2).apply(subject)

    assert isinstance(outcome, Changed)
    assert not outcome.exact
    assert counts(subject.model) == {2}
    assert difference(logits(io.to_proto(subject.model)), before) < 1e-5


@pytest.mark.parametrize("name", EXPORTS)
def test_merging_changes_logits_and_makes_weights_smaller(name):
    subject = load(name)
    before = io.to_proto(subject.model)

    MergeKvHeads(kv_heads=1).apply(subject)

    after = io.to_proto(subject.model)
    onnx.checker.check_model(after)
    assert counts(subject.model) == {1}
    assert elements(after) < elements(before)
    assert difference(logits(after), logits(before)) > 1e-3


@pytest.mark.parametrize("method", ["mean", "running", "first"])
@pytest.mark.parametrize("name", EXPORTS)
def test_shared_layers_have_one_cache_entry_and_fewer_weights(name, method):
    subject = load(name)
    before = io.to_proto(subject.model)

    ShareKvLayers(kv_layers=1, method=method).apply(subject)

    after = io.to_proto(subject.model)
    onnx.checker.check_model(after)
    assert entries(subject.model) == 1
    assert elements(after) < elements(before)
    assert difference(logits(after), logits(before)) > 1e-3


@pytest.mark.parametrize("name", GROUPED)
def test_a_cache_keeps_its_names_and_gets_the_new_number_of_heads(name):
    subject = load(name)
    Inject(past="p.{layer}.{kind}", present="q.{layer}.{kind}").apply(subject)
    names = [value.name for value in (*subject.model.graph.inputs, *subject.model.graph.outputs)]

    ExpandGqa().apply(subject)

    graph = subject.model.graph
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == names
    assert {value.shape[1] for value in graph.inputs if value.name.startswith("p.")} == {4}


@pytest.mark.parametrize("name", ["llama_dynamo_sdpa", "neox_torchscript_eager"])
def test_a_refused_model_is_unchanged(name):
    subject = load(name)
    before = io.to_proto(subject.model).SerializeToString()

    with pytest.raises(Exception, match="expected one of"):
        MergeKvHeads(kv_heads=3).apply(subject)

    assert io.to_proto(subject.model).SerializeToString() == before
