"""The pass of the README is idempotent, and its table and its test command are complete. `make user` runs all of it."""

from __future__ import annotations

import re
from pathlib import Path

from decoders import Config, Decoder
from doc_blocks import blocks_of

from kvsurgeon.cli.main import run
from kvsurgeon.workflow import registry
from kvsurgeon.workflow.pipeline import Pipeline

README = Path(__file__).parents[1] / "README.md"


def test_the_pass_of_the_readme_is_idempotent():
    names = {"__name__": __name__}  # a dataclass looks up the module that it is in
    (code,) = [block.code for block in blocks_of(README) if block.title == "my_pass.py"]
    exec(code, names)
    result = Pipeline((names["RenameLogits"](to="y"),)).run(Decoder(Config()).model())
    assert result.model.graph.outputs[0].name == "y"
    assert not Pipeline((names["RenameLogits"](to="y"),)).run(result.model).changed


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
