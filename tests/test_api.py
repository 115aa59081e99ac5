"""The public names of the package."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from decoders import Config, Decoder
from public_api import public_names, section, undocumented

import kvsurgeon
from kvsurgeon import errors
from kvsurgeon.errors import UsageError

PUBLIC = public_names()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_with_its_parameters_and_errors(name):
    value = PUBLIC[name]
    assert value.__doc__
    assert undocumented(value) == set()
    if inspect.isfunction(value):
        raised = section(value, "Raises")
        assert raised
        assert {one for one in raised if not issubclass(getattr(errors, one, object), errors.KvsurgeonError)} == set()


def test_the_documented_names_are_those_of_the_package_and_the_types_of_results():
    assert {f"kvsurgeon.{name}" for name in kvsurgeon.__all__} - set(PUBLIC) == {"kvsurgeon.__version__"}
    assert {"Attention", "Decoder", "Generation", "PipelineRun", "Report"} <= set(PUBLIC)


def test_every_error_is_at_the_top_level():
    assert {name for name in vars(errors) if name.endswith("Error")} <= set(kvsurgeon.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kvsurgeon' has no attribute 'nothing'"):
        _ = kvsurgeon.nothing
    assert dir(kvsurgeon) == sorted(kvsurgeon.__all__)


def test_the_import_loads_no_heavy_module():
    code = "import sys, kvsurgeon; print([name for name in ('onnx', 'numpy', 'typer') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_find_attention_does_not_change_the_model():
    model = Decoder(Config()).model()
    before = model.SerializeToString()
    layers = kvsurgeon.find_attention(model)
    assert [(one.query_heads, one.kv_heads, one.head_dim, one.mask.kind) for one in layers] == [
        (4, 2, 8, "causal"),
        (4, 2, 8, "sliding-window"),
        (4, 2, 8, "causal"),
    ]
    assert model.SerializeToString() == before


def test_inject_takes_options_and_does_not_change_a_proto(tmp_path):
    model = Decoder(Config()).model()
    before = model.SerializeToString()
    run = kvsurgeon.inject(model, tmp_path / "out", present="kept.{layer}.{kind}")
    assert run.verification.ok
    assert "kept.0.key" in [value.name for value in onnx.load(run.path).graph.output]
    assert model.SerializeToString() == before


SOURCES = {
    "path": str,
    "Path": Path,
    "folder": lambda path: path.parent,
    "bytes": lambda path: path.read_bytes(),
    "proto": onnx.load,
    "ir": ir.load,
    "graph": lambda path: gs.import_onnx(onnx.load(path)),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(Decoder(Config()).model(), path)
    return path


@pytest.mark.parametrize("kind", SOURCES)
def test_every_function_takes_every_kind_of_model(kind, file):
    source = SOURCES[kind](file)
    before = kvsurgeon.generate(source, [1, 2, 3], max_new_tokens=4)
    made = kvsurgeon.inject(source, verify=False)
    assert kvsurgeon.generate(made.model, [1, 2, 3], max_new_tokens=4).tokens == before.tokens


def test_models_in_memory_are_verified_and_plotted(file):
    made = kvsurgeon.inject(file.read_bytes(), effort="quick", seed=1)
    assert kvsurgeon.verify(file, made.model, effort="quick", seed=1).ok
    assert kvsurgeon.plot(made.model, prompt=[1, 2, 3], against=made.to_proto()).axes


def test_results_have_short_forms_and_are_saved(file, tmp_path):
    decoder = kvsurgeon.inspect(file)
    assert repr(decoder) == "Decoder(3 layers, without a cache, 384 bytes per token)"
    made = kvsurgeon.inject(file, effort="quick")
    assert repr(made) == "PipelineRun(inject: same)"
    assert repr(made.verification).startswith("Report(same: error ")
    assert made.save(tmp_path / "saved") == tmp_path / "saved" / "model.onnx"
    generated = kvsurgeon.generate(tmp_path / "saved", [1, 2, 3], max_new_tokens=4)
    assert repr(generated).startswith("Generation('(")
    assert all(len(repr(one)) < 120 for one in (decoder, made, made.verification, generated))


def test_a_cache_is_changed_and_removed(file, tmp_path):
    options = {"verify": False}
    cached = kvsurgeon.inject(file, **options)
    static = kvsurgeon.retarget(cached.to_proto(), tmp_path / "static.onnx", cache="static", **options)
    assert kvsurgeon.inspect(static.path).cache[0].cache_mode == "static"
    again = kvsurgeon.remove_cache(static.path, effort="quick", seed=1)
    assert kvsurgeon.verify(file, again.model, effort="quick", seed=1).ok
    assert [step.name for step in kvsurgeon.run(file, "inject,remove-cache", **options).steps] == [
        "inject",
        "remove-cache",
    ]


def test_models_in_memory_from_two_folders_are_rejected(file, tmp_path):
    shutil.copy(file, tmp_path)
    with pytest.raises(UsageError, match="in one folder"):
        kvsurgeon.verify(kvsurgeon.load(file), kvsurgeon.load(tmp_path / "model.onnx"))


def test_the_folder_of_a_target_is_not_saved_later(file):
    made = kvsurgeon.inject(file, target="optimum", verify=False)
    with pytest.raises(UsageError, match="destination of inject"):
        made.save("somewhere")
