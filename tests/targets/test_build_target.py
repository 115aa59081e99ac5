"""`build_target` writes all that the client reads, or raises and writes nothing."""

import json
import shutil
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import onnx
import pytest
from decoders import Config, Decoder

import kvsurgeon
from kvsurgeon.cli.main import run
from kvsurgeon.errors import PluginError, UnsupportedError, UsageError
from kvsurgeon.passes.contract import Subject
from kvsurgeon.passes.interface.integer_inputs import Int32Inputs
from kvsurgeon.targets import TARGETS, Target
from kvsurgeon.workflow.build_target import build_target, check_target

PLAIN = Target(name="plain", summary="any client", tested_with="nothing")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a decoder without a cache, its weights in two files, and a config."""
    folder = tmp_path_factory.mktemp("given")
    model = Decoder(Config()).model()
    outside = {"save_as_external_data": True, "all_tensors_to_one_file": False, "size_threshold": 8000}
    onnx.save(model, folder / "model.onnx", **outside)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "num_attention_heads": 4, "hidden_size": 32}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_model_data_and_side_files_have_the_paths_of_the_target(given, tmp_path):
    target = replace(PLAIN, file="onnx/model.onnx", data="model.onnx_data", side_files={
        "about.json": lambda model: {"layers": model.layers, "heads": model.kv_heads},
        "config.json": lambda model: {**model.config, "heads": model.query_heads},
        "none.json": lambda _: None,
    })  # fmt: skip
    done = build_target(given, target, tmp_path / "out", verify=False)
    assert done.path == tmp_path / "out" / "onnx" / "model.onnx"
    expected = ["about.json", "config.json", "onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json"]
    assert [name for name in files(tmp_path / "out") if not name.startswith("onnx/model.onnx_data_")] == expected
    assert "onnx/model.onnx_data_1" in files(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "about.json").read_text()) == {"layers": 3, "heads": [2]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["heads"] == 4
    assert kvsurgeon.verify(given, done.path).verdict == "same"


def test_side_files_can_read_the_files_that_they_replace(given, tmp_path):
    names = ("config.json", "tokenizer.json", "none.json", "broken.json", "list.json")
    source = shutil.copytree(given, tmp_path / "source")
    (source / "tokenizer.json").write_text('{"words": 3}')
    (source / "broken.json").write_text("{")
    (source / "list.json").write_text("[]")
    found = {}
    side_files = {name: lambda model: found.update(model.source_files) for name in names}
    build_target(source, replace(PLAIN, side_files=side_files), tmp_path / "out", verify=False)
    assert found == {"config.json": json.loads((given / "config.json").read_text()), "tokenizer.json": {"words": 3}}
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"words": 3}


def test_renamed_data_files_hold_the_same_weights(given, tmp_path):
    done = build_target(given, replace(PLAIN, data="weights"), tmp_path, verify=False)
    original = {value.name: value.const_value.numpy() for value in kvsurgeon.load(given).graph.initializers.values()}
    for value in kvsurgeon.load(done.path).graph.initializers.values():
        if value.name in original:
            np.testing.assert_array_equal(value.const_value.numpy(), original[value.name])


@pytest.mark.parametrize(
    ("wants", "said"),
    [
        ({"required": ("input_ids", "position_ids")}, "expected an input or output `position_ids`"),
        (
            {"allowed_inputs": frozenset(("input_ids",))},
            "expected no inputs but `input_ids` and the cache, found another",
        ),
        ({"dtypes": {"input_ids": frozenset(("int32",))}}, "expected int32, found int64 - at `input_ids`"),
        ({"cache_dtypes": frozenset(("float16",))}, "expected a cache of float16, found float32"),
        ({"static_axes": (0,)}, "expected a fixed size for batch, found batch_size"),
        ({"max_opset": 17}, "expected opset 17 or older, found opset 18"),
        ({"unsupported_operators": frozenset((("", "Softmax"),))}, "plain has no operator Softmax"),
        ({"operators": frozenset((("", "MatMul"),))}, "plain has no operator"),
    ],
)
def test_an_incompatibility_is_found_before_anything_is_written(given, tmp_path, wants, said):
    target = replace(PLAIN, **wants)
    assert said in str([str(one) for one in check_target(given, target) if one.blocking])
    with pytest.raises(UnsupportedError, match="target plain: "):
        build_target(given, target, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_a_target_without_requirements_has_no_incompatibilities(given):
    assert check_target(given, PLAIN) == ()


def test_a_missing_source_file_is_a_warning(given, tmp_path):
    done = build_target(given, replace(PLAIN, required_files=("merges.txt",)), tmp_path, verify=False)
    assert [one.at for one in done.warnings] == ["merges.txt"]
    assert any("merges.txt" in note for note in done.notes)


def test_options_replace_those_of_the_target(given, tmp_path):
    done = kvsurgeon.inject(given, tmp_path, target=PLAIN, verify=False, past="memory.{layer}.{kind}")
    assert "memory.0.key" in {value.name for value in done.model.graph.inputs}


def test_a_target_needs_a_folder_or_the_file_that_it_loads(given, tmp_path):
    with pytest.raises(
        UsageError, match=r"expected a folder for target plain, or `model\.onnx` in one, found the file"
    ):
        build_target(given, PLAIN, tmp_path / "other.onnx")
    written = build_target(given, PLAIN, tmp_path / "out" / "model.onnx", verify=False)
    assert written.path == tmp_path / "out" / "model.onnx"


def test_a_model_in_memory_gets_the_side_files_of_its_folder(given, tmp_path):
    model = onnx.load(given / "model.onnx", load_external_data=False)
    build_target(model, PLAIN, tmp_path / "out", folder=given, verify=False)
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_unknown_target_is_an_error_that_lists_the_known_ones(given):
    with pytest.raises(UsageError, match=r"unknown target 'nothing'; expected one of optimum"):
        check_target(given, "nothing")


@pytest.mark.parametrize("entry", TARGETS.plugins(), ids=lambda entry: entry.name)
def test_every_target_loads_and_describes_itself(entry, capsys):
    target = entry.load()
    assert target.name == entry.name
    assert target.summary
    assert target.tested_with
    assert run(["targets", entry.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == list(target.files)
    assert run(["targets", entry.name]) == 0
    assert target.summary in capsys.readouterr().out


def test_the_description_of_a_target_lists_passes_and_changed_options(capsys):
    assert run(["targets", "qnn"]) == 0
    shown = capsys.readouterr().out
    assert all(f"pass {one.name}" in shown for one in TARGETS.find("qnn").load().passes)
    assert "key-layout=kv_heads, batch, head_dim, sequence" in shown
    assert "cache-dtype" not in shown
    assert "decode.onnx: 1" in shown


def test_all_targets_are_listed(capsys):
    assert run(["targets"]) == 0
    shown = capsys.readouterr().out
    assert all(entry.name in shown for entry in TARGETS.plugins())
    assert run(["targets", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == [one.name for one in TARGETS.plugins()]


def test_a_custom_target_is_loaded_by_its_entry_point(monkeypatch, given, capsys):
    module = ModuleType("tests_of_targets")
    module.OWN, module.BAD = replace(PLAIN, name="own"), "no target"
    monkeypatch.setitem(sys.modules, "tests_of_targets", module)
    monkeypatch.setitem(TARGETS.built_in, "own", "tests_of_targets:OWN")
    monkeypatch.setitem(TARGETS.built_in, "bad", "tests_of_targets:BAD")
    assert check_target(given, "own") == ()
    with pytest.raises(PluginError, match=r"expected a kvsurgeon\.targets\.Target, found str"):
        TARGETS.find("bad").load()
    assert run(["targets"]) == 0
    assert "expected a kvsurgeon.targets.Target" in capsys.readouterr().out


def test_a_shared_buffer_has_its_operator_and_its_config(given, tmp_path):
    done = build_target(given, "genai-shared-buffer", tmp_path / "out")
    assert "GroupQueryAttention" in {node.op_type for node in done.model.graph}
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    assert kvsurgeon.verify(given, done.path).verdict == "same"


def test_int32_ids_become_int64_for_transformers_js(tmp_path):
    subject = Subject.of(Decoder(Config(layers=1)).model())
    Int32Inputs().apply(subject)
    kvsurgeon.save(subject.model, tmp_path / "narrow.onnx")
    done = build_target(tmp_path / "narrow.onnx", "transformers-js", tmp_path / "out")
    given = {value.name: value.dtype.name for value in done.model.graph.inputs}
    assert (given["input_ids"], given["attention_mask"]) == ("INT64", "INT64")


def test_the_command_writes_the_folder(given, tmp_path, capsys):
    assert run(["inject", str(given), "-o", str(tmp_path), "--target", "optimum", "--no-verify", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["output"] == str(tmp_path / "model.onnx")
    assert any("model_type gemma" in note for note in answer["notes"])
    assert files(tmp_path)[0] == "config.json"


def test_inspect_lists_incompatibilities(given, tmp_path, capsys):
    assert run(["inspect", str(given), "--target", "optimum"]) == 0
    assert "no incompatibilities" in capsys.readouterr().out
    onnx.save(Decoder(Config(dtype="float64")).model(), tmp_path / "model.onnx")
    assert run(["inspect", str(tmp_path), "--target", "optimum", "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["stops"]
    assert "found float64" in answer["obstacles"][0]["what"]


def test_a_folder_never_holds_two_models(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    onnx.save(Decoder(Config()).model(), folder / "other.onnx")
    with pytest.raises(UsageError, match="expected another folder than that of the source"):
        kvsurgeon.inject(folder / "other.onnx", folder, target="optimum", verify=False)
    assert [file.name for file in folder.iterdir()] == ["other.onnx"]
