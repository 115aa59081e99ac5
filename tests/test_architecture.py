"""The layout is as docs/architecture.md draws it: imports go up, and the judge does not know the surgeon."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvsurgeon"
DRAWN = re.search(r"^```\n(.*?)^```$", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
LAYERS = [line.split()[0].removesuffix("/") for line in DRAWN.group(1).splitlines()]

JUDGE = {"runtime", "parity"}
SURGEON = {"graph", "symbolic", "ops", "dataflow", "analysis", "proof", "rewrite", "anatomy", "passes"}
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}

FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def name_of(path):
    return path.relative_to(SOURCE).as_posix()


def layer_of(path):
    return path.relative_to(SOURCE).parts[0]


def imported(path):
    """Layers that a file imports, be it at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name_of(path)}: expected absolute imports, found one at line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *inner = name.split(".")
            if package == "kvsurgeon":
                assert inner, f"{name_of(path)}: imports the whole package at line {node.lineno}"
                yield inner[0] if (SOURCE / inner[0]).is_dir() else f"{inner[0]}.py"


def test_every_file_and_folder_is_drawn_and_there():
    there = {layer_of(path) for path in FILES}
    assert sorted(LAYERS) == sorted(there)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_only_upwards(layer):
    above = LAYERS[: LAYERS.index(layer) + 1]
    for path in FILES:
        if layer_of(path) == layer:
            assert set(imported(path)) <= set(above), name_of(path)


def test_the_judge_does_not_know_the_surgeon():
    reached = set(JUDGE)
    while True:
        more = {one for path in FILES if layer_of(path) in reached for one in imported(path)}
        if more <= reached:
            break
        reached |= more
    assert not reached & SURGEON


@pytest.mark.parametrize(
    "folder", [SOURCE, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"], ids=lambda path: path.name
)
def test_a_name_says_what_is_inside(folder):
    names = {part.removesuffix(".py") for path in folder.rglob("*.py") for part in path.relative_to(folder).parts}
    assert names
    assert not names & SAYS_NOTHING


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_module_says_what_it_is(path):
    module = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(module) or not module.body
