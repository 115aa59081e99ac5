"""The snippets, commands and table of the README are correct."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import onnx
import pytest
from decoders import Config, Decoder
from tokenizers import Tokenizer, models, pre_tokenizers

from kvsurgeon.cli.main import run
from kvsurgeon.workflow import registry
from kvsurgeon.workflow.pipeline import Pipeline

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def model(tmp_path, monkeypatch):
    """Write the folder `model` of the README into the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(Decoder(Config()).model(), folder / "model.onnx")
    words = {word: number for number, word in enumerate(["?", "Once", "upon", "a", "time"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def snippet(word):
    (found,) = [text for text in SNIPPETS if word in text]
    return found


def test_the_snippet_with_a_proto_runs(model, capsys):
    exec(snippet("KeyValueCacheInjector"), {})
    assert "past_key_values.2.value" in [value.name for value in onnx.load(model / "model.onnx").graph.input]
    assert capsys.readouterr().out.strip()


def test_the_snippet_with_paths_runs(model):
    names = {}
    exec(snippet("kvsurgeon.inject("), names)
    assert names["result"].path == model.parent / "model-with-cache" / "model.onnx"
    assert [attention.query_heads for attention in names["decoder"].attentions] == [4, 4, 4]


def test_the_pass_of_the_readme_runs_and_is_idempotent(model):
    names = {"__name__": __name__}  # a dataclass looks up the module that it is in
    exec(snippet("class RenameLogits"), names)
    result = Pipeline((names["RenameLogits"](to="y"),)).run(model)
    assert result.model.graph.outputs[0].name == "y"
    again = Pipeline((names["RenameLogits"](to="y"),)).run(result.model)
    assert not again.changed


def test_the_command_with_the_pass_of_the_readme_runs(model):
    Path("my_pass.py").write_text(snippet("class RenameLogits"), "utf-8")
    (command,) = re.findall(r"^kvsurgeon (run model --load .*)$", README.read_text("utf-8"), re.MULTILINE)
    assert run(shlex.split(command)) == 0
    assert onnx.load("model-with-cache/model.onnx").graph.output[0].name == "scores"


def test_the_commands_from_an_export_to_a_text_run_in_order(tmp_path, monkeypatch, capsys):
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    block = re.search(r"```sh\n(kvsurgeon demo --export-only.*?)```", README.read_text("utf-8"), re.DOTALL).group(1)
    commands = [shlex.split(line)[1:] for line in block.splitlines()]
    assert [command[0] for command in commands] == ["demo", "inject", "generate"]
    for command in commands:
        assert run(command) == 0
    assert "tokens with a cache" in capsys.readouterr().err


def test_the_function_on_onnx_graphsurgeon_runs(model):
    names = {}
    exec(snippet("import onnx_graphsurgeon"), names)
    assert [step.name for step in names["result"].steps] == ["drop-casts-to-the-same-type"]


def test_the_table_lists_all_commands_but_passes_and_nothing_else(capsys):
    run(["--help"])
    listed = capsys.readouterr().out.partition("Commands:\n")[2]
    commands = {line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "}
    documented = set(re.findall(r"^\| `kvsurgeon ([\w-]+)", README.read_text("utf-8"), re.MULTILINE))
    assert documented <= commands
    assert documented >= commands - set(registry.BUILT_IN)


def test_the_test_command_is_that_of_ci():
    script = (README.parent / ".ci" / "run").read_text("utf-8")
    assert "'pip install \".[test]\" && pytest'" in script
    assert 'pip install ".[test]" && pytest\n' in README.read_text("utf-8")
