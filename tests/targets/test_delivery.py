"""A target's folder holds the model and all that its client reads, or nothing is written and it is said why."""

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
from kvsurgeon.targets import TARGETS, SideFile, Target
from kvsurgeon.workflow.delivery import deliver, stands_between

PLAIN = Target(name="plain", summary="whoever takes it", tried="nothing")


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


def test_model_data_and_side_files_lie_where_the_target_says(given, tmp_path):
    target = replace(PLAIN, file="onnx/model.onnx", data="model.onnx_data", side_files=(
        SideFile(name="about.json", write=lambda facts: {"layers": facts.layers, "heads": facts.kv_heads}),
        SideFile(name="config.json", write=lambda facts: {**facts.config, "heads": facts.query_heads}),
        SideFile(name="none.json", write=lambda _: None),
    ))  # fmt: skip
    done = deliver(given, target, tmp_path / "out", verify=False)
    assert done.path == tmp_path / "out" / "onnx" / "model.onnx"
    expected = ["about.json", "config.json", "onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json"]
    assert [name for name in files(tmp_path / "out") if not name.startswith("onnx/model.onnx_data_")] == expected
    assert "onnx/model.onnx_data_1" in files(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "about.json").read_text()) == {"layers": 3, "heads": [2]}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["heads"] == 4
    assert kvsurgeon.verify(given, done.path).verdict == "same"


def test_what_the_source_has_under_the_name_of_a_side_file_is_told(given, tmp_path):
    names = ("config.json", "tokenizer.json", "none.json", "broken.json", "list.json")
    source = shutil.copytree(given, tmp_path / "source")
    (source / "tokenizer.json").write_text('{"words": 3}')
    (source / "broken.json").write_text("{")
    (source / "list.json").write_text("[]")
    told = {}
    side_files = tuple(SideFile(name=name, write=lambda facts: told.update(facts.beside)) for name in names)
    deliver(source, replace(PLAIN, side_files=side_files), tmp_path / "out", verify=False)
    assert told == {"config.json": json.loads((given / "config.json").read_text()), "tokenizer.json": {"words": 3}}
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"words": 3}


def test_weights_under_other_names_are_the_same_weights(given, tmp_path):
    done = deliver(given, replace(PLAIN, data="weights"), tmp_path, verify=False)
    original = {value.name: value.const_value.numpy() for value in kvsurgeon.load(given).graph.initializers.values()}
    for value in kvsurgeon.load(done.path).graph.initializers.values():
        if value.name in original:
            np.testing.assert_array_equal(value.const_value.numpy(), original[value.name])


@pytest.mark.parametrize(
    ("wants", "said"),
    [
        ({"needs": ("input_ids", "position_ids")}, "expected an input or output `position_ids`"),
        ({"feeds": frozenset(("input_ids",))}, "expected no inputs but `input_ids` and the cache, found another"),
        ({"dtypes": {"input_ids": frozenset(("int32",))}}, "expected int32, found int64 - at `input_ids`"),
        ({"cache_dtypes": frozenset(("float16",))}, "expected a cache of float16, found float32"),
        ({"fixed_axes": (0,)}, "expected a number for batch, found batch_size"),
        ({"opset": 17}, "expected operators of opset 17 or older, found opset 18"),
        ({"banned": frozenset((("", "Softmax"),))}, "the operator Softmax is none that plain has"),
        ({"operators": frozenset((("", "MatMul"),))}, "the operator"),
    ],
)
def test_what_stands_in_the_way_is_said_beforehand_and_nothing_is_written(given, tmp_path, wants, said):
    target = replace(PLAIN, **wants)
    assert said in str([str(one) for one in stands_between(given, target) if one.stops])
    with pytest.raises(UnsupportedError, match="target plain: "):
        deliver(given, target, tmp_path / "out", verify=False)
    assert not (tmp_path / "out").exists()


def test_nothing_stands_in_the_way_of_a_target_that_wants_nothing(given):
    assert stands_between(given, PLAIN) == ()


def test_a_file_that_the_client_will_miss_is_a_remark(given, tmp_path):
    done = deliver(given, replace(PLAIN, beside=("merges.txt",)), tmp_path, verify=False)
    assert [remark.at for remark in done.remarks] == ["merges.txt"]
    assert any("merges.txt" in note for note in done.notes)


def test_options_that_are_given_take_the_place_of_the_targets(given, tmp_path):
    done = kvsurgeon.inject(given, tmp_path, target=PLAIN, verify=False, past="memory.{layer}.{kind}")
    assert "memory.0.key" in {value.name for value in done.model.graph.inputs}


def test_a_target_takes_a_folder(given, tmp_path):
    with pytest.raises(UsageError, match="expected a folder"):
        deliver(given, PLAIN, tmp_path / "model.onnx")


def test_an_unknown_target_is_named_with_those_that_there_are(given):
    with pytest.raises(UsageError, match=r"unknown target 'nothing'; expected one of optimum"):
        stands_between(given, "nothing")


@pytest.mark.parametrize("entry", TARGETS.plugins(), ids=lambda entry: entry.name)
def test_every_target_can_be_had_and_describes_itself(entry, capsys):
    target = entry.load()
    assert target.name == entry.name
    assert target.summary
    assert target.tried
    assert run(["targets", entry.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == list(target.files)
    assert run(["targets", entry.name]) == 0
    assert target.summary in capsys.readouterr().out


def test_a_target_names_every_pass_it_runs_and_options_that_are_not_the_usual_ones(capsys):
    assert run(["targets", "qnn"]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"pass {one.name}" in shown for one in (*TARGETS.find("qnn").load().passes, *TARGETS.find("qnn").load().finish)
    )
    assert "key-layout=kv_heads, batch, head_dim, sequence" in shown
    assert "cache-dtype" not in shown
    assert "decode.onnx: 1" in shown


def test_the_list_of_targets_names_them_all(capsys):
    assert run(["targets"]) == 0
    shown = capsys.readouterr().out
    assert all(entry.name in shown for entry in TARGETS.plugins())
    assert run(["targets", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == [one.name for one in TARGETS.plugins()]


def test_a_target_of_ones_own_comes_by_an_entry_point(monkeypatch, given, capsys):
    module = ModuleType("tests_of_targets")
    module.OWN, module.BAD = replace(PLAIN, name="own"), "no target"
    monkeypatch.setitem(sys.modules, "tests_of_targets", module)
    monkeypatch.setitem(TARGETS.built_in, "own", "tests_of_targets:OWN")
    monkeypatch.setitem(TARGETS.built_in, "bad", "tests_of_targets:BAD")
    assert stands_between(given, "own") == ()
    with pytest.raises(PluginError, match=r"expected a kvsurgeon\.targets\.Target, found str"):
        TARGETS.find("bad").load()
    assert run(["targets"]) == 0
    assert "expected a kvsurgeon.targets.Target" in capsys.readouterr().out


def test_one_buffer_for_past_and_present_is_an_operator_that_writes_it_and_a_config_that_says_so(given, tmp_path):
    done = deliver(given, "genai-shared-buffer", tmp_path / "out")
    assert "GroupQueryAttention" in {node.op_type for node in done.model.graph}
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    assert kvsurgeon.verify(given, done.path).verdict == "same"


def test_ids_of_32_bits_are_given_to_transformers_js_as_64(tmp_path):
    subject = Subject.of(Decoder(Config(layers=1)).model())
    Int32Inputs().apply(subject)
    kvsurgeon.save(subject.model, tmp_path / "narrow.onnx")
    done = deliver(tmp_path / "narrow.onnx", "transformers-js", tmp_path / "out")
    given = {value.name: value.dtype.name for value in done.model.graph.inputs}
    assert (given["input_ids"], given["attention_mask"]) == ("INT64", "INT64")


def test_the_command_writes_the_folder_and_says_so(given, tmp_path, capsys):
    assert run(["inject", str(given), "-o", str(tmp_path), "--target", "optimum", "--no-verify", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["output"] == str(tmp_path / "model.onnx")
    assert any("model_type gemma" in note for note in answer["notes"])
    assert files(tmp_path)[0] == "config.json"


def test_inspect_says_what_stands_in_the_way(given, tmp_path, capsys):
    assert run(["inspect", str(given), "--target", "optimum"]) == 0
    assert "nothing stands in the way" in capsys.readouterr().out
    onnx.save(Decoder(Config(dtype="float64")).model(), tmp_path / "model.onnx")
    assert run(["inspect", str(tmp_path), "--target", "optimum", "--json"]) == 3
    answer = json.loads(capsys.readouterr().out)
    assert answer["stops"]
    assert "found float64" in answer["obstacles"][0]["what"]


def test_a_folder_never_holds_two_models(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    onnx.save(Decoder(Config()).model(), folder / "other.onnx")
    with pytest.raises(UsageError, match="write to another folder"):
        kvsurgeon.inject(folder / "other.onnx", folder, target="optimum", verify=False)
    assert [file.name for file in folder.iterdir()] == ["other.onnx"]
