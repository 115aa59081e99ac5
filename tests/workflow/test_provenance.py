"""The metadata of a result names the tool, the passes with their options, and the graph that they began with."""

from __future__ import annotations

import json

import onnx
import onnx_ir as ir
import pytest
from decoders import Config, Decoder

from kvsurgeon import io
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.interface.rename_io import RenameIo
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.provenance import KEY, digest_of, pass_text


def entries(model):
    return json.loads(model.metadata_props[KEY])


def test_each_run_that_changes_the_model_adds_an_entry():
    given = Decoder(Config()).model()
    source = digest_of(io.load(given))
    first = Pipeline.parse("inject{cache=static,max-length=64},reciprocal-to-div").run(given)
    (entry,) = entries(first.model)
    assert (entry["source"], entry["passes"]) == (source, ["inject{cache=static,max_length=64}"])
    assert entry["tool"].startswith("kvsurgeon ")
    between = digest_of(first.model)
    second = Pipeline.parse("rename-io{names=logits:scores}").run(first.model)
    assert [one["source"] for one in entries(second.model)] == [source, between]
    again = Pipeline.parse("rename-io{names=logits:scores}").run(second.model)
    assert not again.changed
    assert len(entries(again.model)) == 2


def test_the_digest_is_that_of_the_graph_without_the_data_of_weights():
    one, other = Decoder(Config()).model(), Decoder(Config()).model()
    weight = next(tensor for tensor in other.graph.initializer if len(tensor.dims) == 2)
    digests = [digest_of(io.load(model)) for model in (one, other)]
    weight.raw_data = bytes(len(weight.raw_data))
    assert [*digests, digest_of(io.load(other))] == digests[:1] * 3
    other.graph.node[0].doc_string = "changed"
    assert digest_of(io.load(other)) != digests[0]
    wider = Decoder(Config(vocabulary=67)).model()
    assert digest_of(io.load(wider)) != digests[0]


def test_metadata_of_this_name_that_is_no_list_is_replaced():
    given = Decoder(Config()).model()
    given.metadata_props.add(key=KEY, value="by hand")
    assert len(entries(Pipeline((Inject(),)).run(given).model)) == 1


@pytest.mark.parametrize(
    "one",
    [
        Inject(),
        Inject(past="k{layer}_{kind}_in", cache="static", max_length=64, input=("z=first-call", "y=fixed")),
        RenameIo(names=("a:b", "c:d")),
    ],
)
def test_a_text_of_a_pass_is_read_as_an_equal_pass(one):
    assert Pipeline.parse(pass_text(one)).passes == (one,)


def test_a_function_is_named_with_its_options():
    def label(model: ir.Model, key: str = "k") -> None:
        model.graph.doc_string = key

    result = Pipeline((label,)).run(Decoder(Config()).model())
    assert entries(result.model)[0]["passes"] == ["label"]
    assert onnx.ModelProto.FromString(result.to_proto().SerializeToString()).metadata_props[0].key == KEY
