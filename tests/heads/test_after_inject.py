"""Heads of a model that has a cache already: whatever its form, it comes back, and remembers what it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvsurgeon import Pipeline, io, verify
from kvsurgeon.passes.contract import Subject

CORPUS = Path(__file__).parents[1] / "corpus"
FORMS = {
    "dynamic": "inject",
    "in place": "inject{cache=static}",
    "in place, so many rows": "inject{cache=static,max-length=48}",
    "in place, by the mask": "inject{cache=static,past-length=mask}",
    "new rows only": "inject{cache=new-tokens,past-length=input}",
    "keys on their side": "inject{key-layout=batch,kv_heads,head_dim,sequence}",
}


def run(name, passes):
    subject = Subject.of(CORPUS / f"{name}.onnx")
    return io.to_proto(Pipeline.parse(passes).run(subject.model, folder=subject.folder).model)


@pytest.fixture(scope="module", params=["bloom_torchscript_eager", "llama_dynamo_sdpa"])
def merged(request):
    """A model with merged heads, and no cache."""
    return request.param, run(request.param, "merge-kv-heads{kv-heads=1,method=first}")


@pytest.mark.parametrize("form", FORMS)
def test_merged_behind_a_cache_is_merged_without_one(merged, form):
    name, without = merged

    found = run(name, f"{FORMS[form]},merge-kv-heads{{kv-heads=1,method=first}}")

    pasts = {one.name for one in found.graph.input if one.name.startswith("past_key_values")}
    assert pasts == {one.name for one in run(name, FORMS[form]).graph.input if one.name.startswith("past_key_values")}
    assert verify(without, found).verdict == "same"
