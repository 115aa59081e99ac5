"""The layout is that of docs/architecture.md: imports go up, and the verifier does not import the analysis."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kvsurgeon"
LISTED = re.search(
    r"^```\n(.*?)^```$", (ROOT / "docs" / "architecture.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)
LAYERS = [line.split()[0].removesuffix("/") for line in LISTED.group(1).splitlines()]

VERIFIER = {"runtime", "parity"}
REWRITER = {"graph", "symbolic", "ops", "dataflow", "analysis", "resizing", "proof", "rewrite", "anatomy", "passes"}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
MOST_FILES, MOST_LINES = 20, 60  # of a folder, of a function

FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def name_of(path):
    return path.relative_to(SOURCE).as_posix()


def layer_of(path):
    return path.relative_to(SOURCE).parts[0]


def imported(path):
    """Yield the folders from which a file imports, at the top or inside a function."""
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


def test_every_file_and_folder_is_listed_and_exists():
    assert sorted(LAYERS) == sorted({layer_of(path) for path in FILES})


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_go_only_upwards(layer):
    above = LAYERS[: LAYERS.index(layer) + 1]
    for path in FILES:
        if layer_of(path) == layer:
            assert set(imported(path)) <= set(above), name_of(path)


def test_the_verifier_does_not_import_the_rewriter():
    reached = set(VERIFIER)
    while True:
        more = {one for path in FILES if layer_of(path) in reached for one in imported(path)}
        if more <= reached:
            break
        reached |= more
    assert not reached & REWRITER


@pytest.mark.parametrize(
    "folder", [SOURCE, ROOT / "tests", ROOT / "benchmarks", ROOT / "examples"], ids=lambda path: path.name
)
def test_no_name_is_vague(folder):
    names = {part.removesuffix(".py") for path in folder.rglob("*.py") for part in path.relative_to(folder).parts}
    assert names
    assert not names & VAGUE


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_has_a_docstring(path):
    module = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(module) or not module.body


def definitions(kind):
    """Yield the definitions of a kind in src, with their files."""
    for path in FILES:
        yield from ((node, path) for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, kind))


def test_no_folder_has_more_than_20_files():
    counts = Counter(path.parent for path in FILES)
    assert not [f"{name_of(folder)}: {count}" for folder, count in counts.items() if count > MOST_FILES]


def test_no_class_name_is_used_twice():
    counts = Counter(node.name for node, _ in definitions(ast.ClassDef))
    assert not [name for name, count in counts.items() if count > 1]


def test_no_function_is_longer_than_60_lines():
    def length(node):
        docstring = ast.get_docstring(node, clean=False) or ""
        return node.end_lineno - node.lineno + 1 - len(docstring.splitlines())

    long = [f"{name_of(path)}: {node.name}" for node, path in definitions(ast.FunctionDef) if length(node) > MOST_LINES]
    assert not long
