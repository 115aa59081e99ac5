"""Hostile files, destinations and packages: one clear line, the right exit code, and nothing written."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from decoders import Config, Decoder
from onnx import helper

from kvsurgeon.cli.main import run
from kvsurgeon.errors import PluginError
from kvsurgeon.passes.contract import Changed, Outcome, Subject

LONG = "n" * 300
DEEP = 100_000
FOLDER = "given"
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A folder with a decoder whose weights are in a file, with a config; the working directory is above it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / FOLDER
    folder.mkdir()
    onnx.save(
        Decoder(Config(layers=1)).model(), folder / "model.onnx", save_as_external_data=True, location="model.data",
        size_threshold=256,
    )  # fmt: skip
    (folder / "config.json").write_text('{"num_attention_heads": 4, "num_key_value_heads": 2}')
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def edited(folder: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def located(location: str) -> Callable[[Path], None]:
    """Change the location of one weight."""

    def edit(model: onnx.ModelProto) -> None:
        weight = next(one for one in model.graph.initializer if one.external_data)
        next(entry for entry in weight.external_data if entry.key == "location").value = location

    return lambda folder: edited(folder, edit)


def functions(calls: dict[str, list[str]]) -> Callable[[Path], None]:
    """Add local functions of one input, each a chain of operators, and call the last on the logits."""

    def edit(model: onnx.ModelProto) -> None:
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        for name, called in calls.items():
            nodes = [
                helper.make_node(one, [f"v{i}"], [f"v{i + 1}"], domain="own" if one in calls else "")
                for i, one in enumerate(called)
            ]
            model.functions.append(helper.make_function("own", name, ["v0"], [f"v{len(called)}"], nodes, opsets))
        producer = next(node for node in model.graph.node if node.output[0] == model.graph.output[0].name)
        producer.output[0] = "before_call"
        model.graph.node.append(
            helper.make_node(list(calls)[-1], ["before_call"], [model.graph.output[0].name], domain="own")
        )
        model.opset_import.append(helper.make_opsetid("own", 1))

    return lambda folder: edited(folder, edit)


def doubling(count: int) -> dict[str, list[str]]:
    return {"F0": ["Identity"], **{f"F{i}": [f"F{i - 1}"] * 2 for i in range(1, count)}}


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace a file of the folder."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def nested(opened: str, closed: str, depth: int = DEEP) -> Callable[[Path], object]:
    return lambda path: path.write_text(opened * depth + "1" + closed * depth)


def outside(path: Path) -> None:
    """Make a link to a file outside the folder, as an archive can contain."""
    secret = path.parents[1] / "secret.json"
    secret.write_text('{"password": 1}')
    path.symlink_to(secret)


def content(name: str, text: str = "mine") -> Callable[[Path], None]:
    """Put a file of other content into the output folder."""

    def change(folder: Path) -> None:
        (folder.parent / "out").mkdir()
        (folder.parent / "out" / name).write_text(text)

    return change


def nothing(folder: Path) -> None:
    """Change nothing."""


INJECT = f"inject {FOLDER} -o out"
ATTACKS = {
    # what the files contain: (change, command, exit code, words)
    "NUL in a location": (located("model\0.data"), INJECT, 4, "in the folder of the model"),
    "location of 300 characters": (located(LONG), INJECT, 4, "found no such file"),
    "location above the folder": (located("../model.data"), INJECT, 4, "in the folder of the model"),
    "data file is a FIFO": (replaced("model.data", os.mkfifo), INJECT, 4, "found no such file"),
    "data file is a folder": (replaced("model.data", os.mkdir), INJECT, 4, "found no such file"),
    "model is a FIFO": (replaced("model.onnx", os.mkfifo), INJECT, 4, "found none"),
    "config nested in lists": (replaced("config.json", nested("[", "]")), INJECT, 4, "nested levels"),
    "config nested in objects": (replaced("config.json", nested('{"a":', "}")), INJECT, 4, "nested levels"),
    "config nested 500 deep": (replaced("config.json", nested('{"a":', "}", 500)), INJECT, 4, "nested levels"),
    "config is a FIFO": (replaced("config.json", os.mkfifo), INJECT, 4, "regular file"),
    "config is a FIFO, inspected": (replaced("config.json", os.mkfifo), f"inspect {FOLDER}", 4, "regular file"),
    "config is a folder": (replaced("config.json", os.mkdir), INJECT, 4, "regular file"),
    "config is a device": (replaced("config.json", lambda p: p.symlink_to("/dev/zero")), INJECT, 4, "regular file"),
    "genai config nested": (
        replaced("genai_config.json", nested("[", "]")), f"replicate-kv-heads {FOLDER} --repeat 2 -o out", 4, "nested",
    ),
    "tokenizer config nested": (
        replaced("tokenizer_config.json", nested("[", "]")), f"{INJECT} --target optimum", 4, "nested levels",
    ),
    "config links outside": (replaced("config.json", outside), INJECT, 4, "found a link"),
    "tokenizer links outside": (replaced("tokenizer.json", outside), INJECT, 4, "found a link"),
    "30 doubling functions": (functions(doubling(30)), INJECT, 4, "nodes after inlining"),
    "doubling functions, verified": (functions(doubling(30)), f"verify {FOLDER} {FOLDER}", 4, "nodes after inlining"),
    "mutually recursive functions": (functions({"F": ["G"], "G": ["F"]}), INJECT, 4, "calls in a cycle"),
    "recursive function": (functions({"F": ["F"]}), INJECT, 4, "calls in a cycle"),
    # names on the command line
    "model of 300 characters": (nothing, f"inject {LONG} -o out", 4, "File name too long"),
    "output of 300 characters": (nothing, f"inject {FOLDER} -o {LONG}", 2, "File name too long"),
    "output file of 300 characters": (nothing, f"inject {FOLDER} -o {LONG}.onnx", 2, "File name too long"),
    "target folder of 300 characters": (
        nothing, f"inject {FOLDER} --target genai -o {LONG}", 2, "File name too long",
    ),
    "trace of 300 characters": (nothing, f"run {FOLDER} -p inject -o out --trace {LONG}", 2, "File name too long"),
    "plot of 300 characters": (nothing, f"plot {FOLDER} --prompt 1,2 -o {LONG}.png", 2, "File name too long"),
    "demo of 300 characters": (nothing, f"demo -o {LONG}", 2, "File name too long"),
    # files that are in the way
    "another config": (content("config.json"), INJECT, 2, "found another file"),
    "another tokenizer config": (content("tokenizer_config.json", "{ }"), INJECT, 2, "found another file"),
    "other weights": (content("model.data"), INJECT, 2, "found another file"),
    "another config of a target": (content("genai_config.json"), f"{INJECT} --target genai", 2, "found another file"),
    "config in place": (nothing, f"replicate-kv-heads {FOLDER} --repeat 2 -o {FOLDER}", 2, "found another file"),
    "output is a data file of the model": (
        nothing, f"inject {FOLDER} -o {FOLDER}/model.data --force", 2, "found the file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_files(name, given, capsys):
    change, command, code, words = ATTACKS[name]
    change(given)
    before = snapshot(given.parent)

    found = run([*command.split(), "--json"] if command.startswith(("inject", "replicate")) else command.split())

    out, err = capsys.readouterr()
    assert (found, err.count("\n")) == (code, 1), err
    assert words in err
    assert "internal error" not in err
    assert snapshot(given.parent) == before
    if command.startswith(("inject", "replicate")):
        error = json.loads(out)["error"]
        assert (error["exit_code"], error["code"][:5]) == (code, f"KVS-{code}")


def snapshot(folder: Path) -> dict[str, object]:
    """Return each file with what identifies its content; a folder that a command created is a change too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and path.stat().st_size else path.is_dir()
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


# Packages


def raising(error: BaseException) -> Callable[[Subject], Outcome]:
    def apply(subject: Subject) -> Outcome:
        raise error

    return apply


def unset(subject: Subject) -> Outcome:
    subject.model = None  # type: ignore[assignment]
    return Changed(edits=1)


def proto(subject: Subject) -> Outcome:
    subject.model = onnx.ModelProto()  # type: ignore[assignment]
    return Changed(edits=1)


class Unspeakable(Exception):  # noqa: N818
    def __str__(self) -> str:
        raise ValueError


class CustomError(BaseException):
    pass


PACKAGES = {
    "sys.exit()": raising(SystemExit()),
    "sys.exit(0)": raising(SystemExit(0)),
    "GeneratorExit": raising(GeneratorExit()),
    "an exception of its own": raising(CustomError("mine")),
    "an exception without a message": raising(Unspeakable()),
    "a message of several lines": raising(ValueError("a\nb\n")),
    "typer.Exit": raising(__import__("typer").Exit(0)),
    "no model": unset,
    "a proto as model": proto,
    "no outcome": lambda subject: None,
    "notes of no text": lambda subject: Changed(edits=1, notes=(1,)),  # type: ignore[arg-type]
    "no notes": lambda subject: Changed(edits=1, notes=None),  # type: ignore[arg-type]
    "head counts of no heads": lambda subject: Changed(edits=1, heads=(1, 2)),  # type: ignore[arg-type]
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Install a package with a pass called `hostile`, and return the function that sets its module's text."""
    site = tmp_path / "site"
    info = site / "hostile-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[kvsurgeon.passes]\nhostile = hostile_module:Hostile\n")
    monkeypatch.syspath_prepend(str(site))
    yield (site / "hostile_module.py").write_text
    sys.modules.pop("hostile_module", None)
    importlib.invalidate_caches()


@pytest.mark.parametrize("name", PACKAGES)
def test_passes_of_packages(name, given, package, monkeypatch, capsys):
    package("class Hostile:\n    name = 'hostile'\n    def apply(self, subject): raise NotImplementedError\n")
    importlib.invalidate_caches()
    module = importlib.import_module("hostile_module")
    monkeypatch.setattr(module.Hostile, "apply", lambda _self, subject: PACKAGES[name](subject))
    before = snapshot(given.parent)

    code = run(["run", FOLDER, "-p", "inject,hostile", "-o", "out", "--json"])

    out, err = capsys.readouterr()
    assert (code, err.count("\n")) == (3, 1), err
    assert "pass hostile" in err
    assert json.loads(out)["error"]["code"] == "KVS-329"
    assert snapshot(given.parent) == before


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "raise GeneratorExit", "raise KeyError('x')", "1 +"])
@pytest.mark.parametrize("command", [f"hostile {FOLDER} -o out", f"run {FOLDER} -p hostile -o out"])
def test_modules_of_packages(command, line, given, package, capsys):
    package(line)
    importlib.invalidate_caches()
    code = run([*command.split(), "--json"])
    out, err = capsys.readouterr()
    assert (code, err.count("\n")) == (2, 1), err
    assert "cannot be imported" in err
    assert json.loads(out)["error"]["code"] == PluginError.code
    assert not (given.parent / "out").exists()


def test_a_package_that_fails_is_listed(given, package, capsys):
    package("print('hello'); raise SystemExit")
    importlib.invalidate_caches()
    assert run(["passes", "--json"]) == 0
    listed = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert "SystemExit" in listed["hostile"]["error"]


# What is allowed


def test_force_replaces_other_files_and_all_written_ones_are_listed(given, capsys):
    content("config.json")(given)
    assert run([*INJECT.split(), "--force", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    written = {Path(one["path"]).name: one["action"] for one in document["files"]}
    assert set(written) == {"model.onnx", "model.data", "config.json", "tokenizer_config.json"}
    assert written["model.onnx"] == "written"
    assert written["model.data"] in ("copied", "cloned")
    assert json.loads(Path("out/config.json").read_text()) == json.loads((given / "config.json").read_text())


def test_the_report_lists_what_was_written(given, capsys):
    assert run(INJECT.split()) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in ("model.data", "config.json", "tokenizer_config.json"):
        assert f"{given.parent / 'out' / name}" in out


def test_files_of_the_same_content_stay(given, capsys):
    assert run([*INJECT.split(), "--no-verify"]) == 0
    inode = Path("out/model.data").stat().st_ino
    capsys.readouterr()
    assert run([*INJECT.split(), "--no-verify", "--json"]) == 0
    assert [Path(one["path"]).name for one in json.loads(capsys.readouterr().out)["files"]] == ["model.onnx"]
    assert Path("out/model.data").stat().st_ino == inode


def test_both_models_are_accepted_by_onnx_after_injection(given):
    assert run(INJECT.split()) == 0
    for path in (given / "model.onnx", Path("out/model.onnx")):
        onnx.load(path)
        onnx.checker.check_model(str(path))


def test_in_the_folder_of_the_model_nothing_is_copied(given, capsys):
    before = snapshot(given)
    assert run(["inject", FOLDER, "-o", f"{FOLDER}/cached.onnx", "--json"]) == 0
    assert [Path(one["path"]).name for one in json.loads(capsys.readouterr().out)["files"]] == ["cached.onnx"]
    assert {name: snapshot(given)[name] for name in before} == before
    for name in ("model.onnx", "cached.onnx"):
        onnx.checker.check_model(str(given / name))


def test_a_hub_snapshot_of_links_is_read_and_saved(given, tmp_path):
    (tmp_path / "blobs").mkdir()
    for file in list(given.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(tmp_path / "blobs" / file.name)
    assert run([*INJECT.split(), "--no-verify"]) == 0
    assert not Path("out/config.json").is_symlink()


@pytest.mark.parametrize("side", ["config.json", "tokenizer_config.json"])
def test_a_link_within_the_folder_is_copied_as_a_file(side, given):
    (given / side).rename(given / "real")
    (given / side).symlink_to("real")
    assert run([*INJECT.split(), "--no-verify"]) == 0
    assert not Path("out", side).is_symlink()


def test_the_hidden_name_of_a_file_is_no_longer_than_file_systems_allow(given):
    name = f"{'n' * 245}.onnx"
    for _ in range(2):
        assert run(["inject", FOLDER, "-o", name, "--no-verify"]) == 0
