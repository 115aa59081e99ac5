"""The docs are correct: snippets compile (tools/new_user.py runs them), links resolve, and every error is described."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import pkgutil
import re
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import typer
from attentions import attention
from decoders import Config, Decoder
from doc_blocks import RUNNABLE, blocks_of, prose_of
from written import read

import kvsurgeon
from kvsurgeon import errors
from kvsurgeon.cli.commands import add_commands
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.ops.table import registered
from kvsurgeon.passes.cache.inject import Inject
from kvsurgeon.passes.contract import Changed, Subject, Unchanged
from kvsurgeon.workflow.pipeline import Pipeline
from kvsurgeon.workflow.registry import PASSES
from kvsurgeon.workflow.run_and_save import run_and_save

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")]
)
ERRORS = (ROOT / "docs" / "errors.md").read_text("utf-8")
COMMAND = r"^(kvsurgeon|python|pip) "
EXAMPLES = {  # of passes of the docs, pip, optimum, Olive and vendors
    "--to", "--option", "--no-deps", "--model", "--task", "--config", "--package-config", "--input_network",
    "--output_path", "--onnx", "--saveEngine",
}  # fmt: skip


def relative(path):
    return str(path.relative_to(ROOT))


def snippets(path):
    return [block for block in blocks_of(path) if block.language == "python"]


def write_model(folder):
    """Write a small decoder, as the folder `model` of the docs."""
    folder.mkdir(parents=True)
    onnx.save(Decoder(Config()).model(), folder / "model.onnx")


# Snippets


@pytest.mark.parametrize("path", [path for path in TEXTS if snippets(path)], ids=relative)
def test_snippets_compile_and_imports_of_those_that_run_exist(path):
    for block in snippets(path):
        body = compile(block.code, f"{relative(path)}:{block.line}", "exec", ast.PyCF_ONLY_AST).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom) and block.runs]
        exec(compile(ast.Module(imports, []), relative(path), "exec"), {})


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_command_is_in_a_block_that_runs_or_says_why_it_does_not(path):
    found = blocks_of(path)
    assert path.read_text("utf-8").count("\n```") == 2 * len(found)
    for block in found:
        assert block.skip is None or block.language in RUNNABLE, block.line
        if path.is_relative_to(ROOT / "docs") or path == ROOT / "README.md":
            assert block.language in RUNNABLE or not re.search(COMMAND, block.code, re.MULTILINE), block.line


@pytest.fixture(scope="module")
def passes(tmp_path_factory):
    """The passes that docs/writing-a-pass.md writes."""
    names = {"__name__": __name__}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("passes")
        write_model(folder / "model")
        patch.chdir(folder)
        for block in snippets(ROOT / "docs" / "writing-a-pass.md")[:2]:
            exec(block.code, names)
    return names


def test_the_pass_that_edits_is_verified_and_idempotent(passes, tmp_path):
    original = Decoder(Config(dtype="float16")).model()
    onnx.save(original, tmp_path / "model.onnx")
    edit = passes["FloatLogits"](output=original.graph.output[0].name)
    done = run_and_save(tmp_path / "model.onnx", Pipeline((edit,)), tmp_path / "wide.onnx")
    assert done.verification.verdict == "same"
    (logits,) = [v for v in onnx.load(tmp_path / "wide.onnx").graph.output if v.name == edit.output]
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert isinstance(edit.apply(Subject(model=done.model)), Unchanged)


def test_the_pass_that_edits_rejects_before_it_edits(passes):
    subject = Subject.of(Decoder(Config()).model())
    before = ir.to_proto(subject.model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match=r"no such output, found .* - at `elsewhere`"):
        passes["FloatLogits"](output="elsewhere").apply(subject)
    assert ir.to_proto(subject.model).SerializeToString(deterministic=True) == before


def test_the_pass_that_reads_facts_labels_each_layer_once(passes):
    subject, label = Subject.of(Decoder(Config(layers=3)).model()), passes["LabelLayers"](key="layer")
    assert label.apply(subject) == Changed(edits=6)
    labels = [node.metadata_props["layer"] for node in subject.model.graph if "layer" in node.metadata_props]
    assert labels == ["0", "0", "1", "1", "2", "2"]
    assert isinstance(label.apply(subject), Unchanged)


def test_the_operator_of_the_docs_can_be_injected():
    names: dict = {}
    exec(snippets(ROOT / "docs" / "writing-an-operator.md")[0].code, names)
    model = read(attention(query="q = my.domain.Gate(q0, k0)"))
    with pytest.raises(UnsupportedError, match="Gate"):
        Inject().apply(Subject.of(model))
    with registered(names["GATE"]):
        assert isinstance(Inject().apply(Subject.of(model)), Changed)


# Commands


def code(path):
    """Return the code blocks and the inline code of a page."""
    return [block.code for block in blocks_of(path)] + re.findall(r"`([^`\n]+)`", prose_of(path))


@pytest.fixture(scope="module")
def options():
    """Names of the options of all commands, and of the scripts of this repository."""
    app = typer.Typer()
    add_commands(app, ["--help"])
    commands = typer.main.get_command(app).commands
    parameters = [parameter for command in commands.values() for parameter in command.params]
    names = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    passes = [plugin.load() for plugin in PASSES.plugins()]
    names |= {"--" + field.name.replace("_", "-") for one in passes for field in dataclasses.fields(one)}
    scripts = [*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("tests/clients/*.py"), *ROOT.glob("examples/*.py")]
    scripts += [ROOT / "tests" / "conftest.py", *ROOT.glob("tools/*.py")]
    written = "".join(path.read_text("utf-8") for path in scripts)
    return names | set(re.findall(r'"(--[\w-]+)"', written)) | {"--debug", "--help", "--install-completion", *EXAMPLES}


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_option_exists(path, options):
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(code(path)))) <= options


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_pipeline_can_be_parsed(path):
    text = "\n".join(code(path))
    for pipeline in re.findall(r'-p "([^"]*)"', text) + re.findall(r"^([a-z0-9-]+\{[^{}]*\})$", text, re.MULTILINE):
        if not re.search(r"a,b\{|name\{|rename-logits\{", pipeline):  # placeholders
            Pipeline.parse(pipeline)


# Links


def targets(path):
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(path)) if not link.startswith(("http:", "https:"))]


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_every_link_resolves_to_a_file_and_a_heading(path):
    for link in targets(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme_directly_or_not():
    visited, pending = set(), [ROOT / "README.md"]
    while pending:
        path = pending.pop().resolve()
        if path in visited:
            continue
        visited.add(path)
        if path.is_dir():
            pending += path.glob("*.md")
        elif path.suffix == ".md":
            pending += [path.parent / link.partition("#")[0] for link in targets(path) if not link.startswith("#")]
    assert {path for path in TEXTS if path.is_relative_to(ROOT / "docs")} <= visited


def test_every_notebook_is_a_page_of_the_site_and_has_no_outputs():
    pages = re.findall(r"^ +- (notebooks/[\w-]+)\.md$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    paths = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    assert sorted(pages) == [f"notebooks/{path.stem}" for path in paths]
    for path in paths:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


# Errors


def classes():
    found = [errors.KvsurgeonError]
    for one in found:
        found += [sub for sub in one.__subclasses__() if not sub.__name__.startswith("_")]
    return set(found)


def test_all_exceptions_are_defined_in_one_file():
    for module in pkgutil.walk_packages(kvsurgeon.__path__, "kvsurgeon."):
        importlib.import_module(module.name)
    assert {one.__module__ for one in classes() if one.__module__.startswith("kvsurgeon.")} == {"kvsurgeon.errors"}


def tree(text):
    """Return names and exit codes below the root of the tree in a text."""
    lines = text[text.index("KvsurgeonError\n") :].partition("\n\n")[0].partition("```")[0]
    return dict(re.findall(r"(\w+) +(\d)(?: |$)", lines, re.MULTILINE))


def test_every_error_has_a_section_in_the_order_of_the_tree():
    headings = re.findall(r"^## (\w+)$", ERRORS, re.MULTILINE)
    assert headings == ["KvsurgeonError", *tree(errors.__doc__)]


@pytest.mark.parametrize("text", [errors.__doc__, ERRORS], ids=["code", "docs"])
def test_the_tree_of_errors_matches_the_classes(text):
    expected = {one.__name__: str(one.exit_code) for one in classes() if one.__module__ == "kvsurgeon.errors"}
    assert expected.pop("KvsurgeonError") == "1"
    assert tree(text) == expected


# Glossary


def test_the_glossary_has_every_dim_and_name_of_a_model_with_a_cache():
    model = Pipeline((Inject(),)).run(Decoder(Config(position_ids=True)).model()).model
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    names = set(re.findall(r"`([\w.{}]+)`", text))
    values = [*model.graph.inputs, *model.graph.outputs]
    for value in values:
        assert re.sub(r"\.\d+\.(key|value)", ".{i}.key", value.name) in names, value.name
        assert {str(dim) for dim in value.shape if not isinstance(dim, int)} <= names, value.name


def test_the_glossary_is_sorted():
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8").partition("## Terms")[2]
    words = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[2:]
    assert len(words) > 20
    assert words == sorted(words)
