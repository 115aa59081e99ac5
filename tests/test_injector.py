"""`KeyValueCacheInjector`, used as in the README."""

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnxruntime
import pytest
from attentions import switched_beyond
from decoders import CachedDecoder, Config, Decoder
from laws import assert_law, in_chunks, in_onnxruntime, texts
from written import read

from kvsurgeon import KeyValueCacheInjector
from kvsurgeon.errors import InputError, KvsurgeonError, ParityError, UnsupportedError, UsageError
from kvsurgeon.exporters.kv_cache_injector import KeyValueCacheInjector as Injector
from kvsurgeon.passes.contract import Subject, Unchanged


@pytest.fixture(scope="module")
def original():
    return Decoder(Config(layers=2)).model()


@pytest.fixture
def folder(tmp_path):
    """Write a folder as exporters do: graph, external weights, config."""
    target = tmp_path / "model"
    target.mkdir()
    save(target, size_threshold=1024)
    (target / "config.json").write_text('{"model_type": "anything"}')
    return target


def save(folder, size_threshold):
    model = Decoder(Config(layers=2)).model()
    data = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": size_threshold}
    onnx.save(model, folder / "model.onnx", **data)


def test_the_example_of_the_readme(folder, original, monkeypatch):
    monkeypatch.chdir(folder.parent)
    weights = (folder / "model.onnx.data").read_bytes()

    model = onnx.load("model/model.onnx", load_external_data=False)
    model = KeyValueCacheInjector("model").apply(model)
    onnx.save(model, "model/model.onnx")

    assert (folder / "model.onnx.data").read_bytes() == weights
    assert len(list(folder.iterdir())) == 3
    assert_law(original, onnx.load("model/model.onnx"))
    assert "Any causal decoder" in KeyValueCacheInjector.supported_models


def test_small_constants_may_be_external_data(folder, original):
    save(folder, size_threshold=0)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    KeyValueCacheInjector(folder).apply(model)
    onnx.save(model, folder / "model.onnx")
    assert_law(original, onnx.load(folder / "model.onnx"))


@pytest.mark.parametrize("where", ["folder", "file", "text"])
def test_the_model_path_may_be_a_folder_or_a_file(folder, where):
    path = {"folder": folder, "file": folder / "model.onnx", "text": str(folder)}[where]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert len(KeyValueCacheInjector(path).apply(model).graph.input) == 2 + 4


def test_a_proto_with_all_weights_needs_no_path(original):
    model = KeyValueCacheInjector().apply(Decoder(Config(layers=2)).model())
    assert_law(original, model)


def test_inplace_is_the_default(original):
    model = Decoder(Config(layers=2)).model()
    before = model.SerializeToString()

    copy = KeyValueCacheInjector(inplace=False).apply(model)
    assert model.SerializeToString() == before
    assert copy is not model

    assert KeyValueCacheInjector().apply(model) is model
    assert [value.name for value in model.graph.input] == [value.name for value in copy.graph.input]


def test_a_rejected_model_is_unchanged():
    model = CachedDecoder(Config(layers=2)).model()
    before = model.SerializeToString()
    with pytest.raises(UnsupportedError, match="already has a cache"):
        KeyValueCacheInjector().apply(model)
    assert model.SerializeToString() == before


def test_export_writes_external_data_and_side_files(folder, tmp_path):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    target = tmp_path / "out" / "model.onnx"
    target.parent.mkdir()

    written = KeyValueCacheInjector(folder).export(model, target)

    assert written == target
    assert (target.parent / "config.json").exists()
    assert (target.parent / "model.onnx.data").exists()
    assert len(onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"]).get_inputs()) == 2 + 4


def test_what_is_exported_can_be_loaded_by_onnx(folder, original, tmp_path):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (tmp_path / "out").mkdir()
    assert_law(original, onnx.load(KeyValueCacheInjector(folder).export(model, tmp_path / "out" / "model.onnx")))


@pytest.mark.parametrize(
    "overrides", [{}, {"num_attention_heads": 4}, {"num_attention_heads": 2}, {"hidden_size_kv_cache": 8},
                  {"num_attention_heads": 4, "hidden_size_kv_cache": 8}],
)  # fmt: skip
def test_overrides_that_agree_with_the_graph(overrides, original):
    model = KeyValueCacheInjector(inplace=False, **overrides).apply(original)
    assert len(model.graph.input) == 2 + 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"num_attention_heads": 3}, "layer 0: expected 3 heads .* found 4 query heads and 2 KV heads"),
     ({"hidden_size_kv_cache": 16}, "layer 0: expected head_dim 16 .* found 8")],
)  # fmt: skip
def test_overrides_that_differ_from_the_graph_are_errors(overrides, message):
    model = Decoder(Config(layers=2)).model()
    before = model.SerializeToString()
    with pytest.raises(UsageError, match=message):
        KeyValueCacheInjector(**overrides).apply(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ["transpose_value_input", "transpose_key_input", "multiply_batch_by_num_att_heads"])
@pytest.mark.parametrize("injector", [KeyValueCacheInjector, Injector])
def test_overrides_that_are_read_from_the_graph_are_warnings(injector, name, original):
    with pytest.warns(UserWarning, match=f"`{name}` is read from the graph") as caught:
        injector(inplace=False, target=None, **{name: True}).apply(original)
    assert caught[0].filename == __file__


def test_a_path_with_nothing_is_an_error():
    with pytest.raises(InputError, match="found nothing at `elsewhere`"):
        KeyValueCacheInjector("elsewhere")


def test_the_snippet_of_sparseml_runs_under_its_import_path(folder, original, monkeypatch):
    monkeypatch.chdir(folder.parent)
    exporter = Injector(model_path="model", num_attention_heads=4, hidden_size_dim=8, target=None)
    exporter.export(onnx.load("model/model.onnx"), "cached.onnx")
    assert_law(original, onnx.load("cached.onnx"))


@pytest.mark.parametrize("path", ["model", "model/model.onnx"])
def test_the_model_at_a_path_gets_its_weights(path, folder, original, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert_law(original, KeyValueCacheInjector().apply(path))


def test_the_form_of_a_target_is_built_if_wanted(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    with pytest.warns(UserWarning, match="DeepSparse ends the process"):
        built = KeyValueCacheInjector(folder, target="deepsparse").apply(onnx.load(folder / "model.onnx"))
    assert {"positions", "causal_mask"} <= {value.name for value in built.graph.input}
    with pytest.raises(UsageError, match="found both"):
        KeyValueCacheInjector(target="deepsparse", additional_transforms=len)
    with pytest.warns(UserWarning, match="internal_kv_cache=False"):
        written = KeyValueCacheInjector(folder, target="deepsparse").export(folder, tmp_path / "deepsparse")
    assert {"model.onnx", "config.json"} <= {file.name for file in written.parent.iterdir()}


def test_an_unknown_override_is_an_error():
    with pytest.raises(UsageError, match="unknown override `heads`"):
        KeyValueCacheInjector(heads=3)


def test_additional_transforms_run_after_the_injection(original):
    seen = []

    def look(graph: gs.Graph) -> None:
        seen.append({value.name for value in graph.inputs})

    class RenameIo:
        name = "rename-io"

        def apply(self, subject: Subject) -> Unchanged:
            seen.append(subject.model.graph.inputs[-1].name)
            return Unchanged(reason="it only looks")

    KeyValueCacheInjector(inplace=False, additional_transforms=look).apply(original)
    KeyValueCacheInjector(inplace=False, additional_transforms=[RenameIo()]).apply(original)
    assert "past_key_values.0.key" in seen[0]
    assert seen[1] == "past_key_values.1.value"


def test_missing_weights_are_an_error(folder):
    (folder / "model.onnx.data").unlink()
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    with pytest.raises(InputError):
        KeyValueCacheInjector(folder).apply(model)


def test_an_empty_proto_is_an_error():
    with pytest.raises(KvsurgeonError):
        KeyValueCacheInjector().apply(onnx.ModelProto())


def test_the_cache_is_that_of_a_manual_export(original):
    by_hand = CachedDecoder(Config(layers=2)).model()
    model = KeyValueCacheInjector(inplace=False).apply(original)
    feeds = texts(original, batch=2, length=6)
    for name in ("logits",):
        found, expected = (in_chunks(one, in_onnxruntime(one), feeds, (4,))[-1][name] for one in (model, by_hand))
        assert abs(found - expected).max() < 1e-4
    assert {value.name for value in model.graph.input} == {value.name for value in by_hand.graph.input}


def test_notes_are_warnings():
    with pytest.warns(UserWarning, match="context depends on the total length beyond 100 tokens, first at `wave`"):
        KeyValueCacheInjector().apply(read(switched_beyond(100)))


def test_the_result_is_verified_if_wanted(original, folder):
    model = KeyValueCacheInjector(inplace=False).apply(original, verify=True)
    assert_law(original, model)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert KeyValueCacheInjector(folder).apply(model, verify=True) is model


def test_a_wrong_result_is_rejected_and_the_model_unchanged(original):
    def other_activations(model: ir.Model) -> None:
        for node in model.graph:
            if node.op_type == "Tanh":
                node.op_type = "Sigmoid"

    model = onnx.ModelProto.FromString(original.SerializeToString())
    with pytest.raises(ParityError, match="differ from those of the original"):
        KeyValueCacheInjector(additional_transforms=other_activations).apply(model, verify=True)
    assert model.SerializeToString() == original.SerializeToString()
    assert KeyValueCacheInjector(additional_transforms=other_activations).apply(model) is model
