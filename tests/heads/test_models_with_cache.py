"""KV head passes on models with a cache: the same form of cache is injected again, with the new heads."""

from __future__ import annotations

from pathlib import Path

import pytest
from unrolled import unrolled

from kvsurgeon import Pipeline, io, verify
from kvsurgeon.passes.contract import Subject, Unchanged

CORPUS = Path(__file__).parents[1] / "corpus"
FORMS = {
    "dynamic": "inject",
    "static": "inject{cache=static}",
    "static, fixed length": "inject{cache=static,max-length=48}",
    "static, length from the mask": "inject{cache=static,past-length=mask}",
    "new tokens": "inject{cache=new-tokens,past-length=input}",
    "transposed keys": "inject{key-layout=batch,kv_heads,head_dim,sequence}",
}


def run(name, passes):
    subject = Subject.of(CORPUS / f"{name}.onnx")
    return io.to_proto(Pipeline.parse(passes).run(subject.model, folder=subject.folder).model)


@pytest.fixture(scope="module", params=["bloom_torchscript_eager", "llama_dynamo_sdpa"])
def merged(request):
    """A model with merged heads and without a cache."""
    return request.param, run(request.param, "merge-kv-heads{kv-heads=1,method=first}")


@pytest.mark.parametrize("form", FORMS)
def test_merging_heads_of_a_model_with_a_cache_equals_merging_without(merged, form):
    name, without = merged

    found = run(name, f"{FORMS[form]},merge-kv-heads{{kv-heads=1,method=first}}")

    pasts = {one.name for one in found.graph.input if one.name.startswith("past_key_values")}
    assert pasts == {one.name for one in run(name, FORMS[form]).graph.input if one.name.startswith("past_key_values")}
    assert verify(without, found).verdict == "same"


@pytest.mark.parametrize("heads", ["expand-gqa", "replicate-kv-heads{repeat=2}", "merge-kv-heads{kv-heads=1}"])
def test_a_model_that_has_states_alone_is_unchanged(heads):
    _, step = Pipeline.parse(f"inject,{heads}").run(unrolled()).steps
    assert step.outcome == Unchanged(reason="the model has no attention")
