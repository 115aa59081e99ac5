"""Generates the pages of the docs site that are not in docs/, as a hook of mkdocs (`make site`).

The pages are the README and its neighbors, the help of each command, the docstring of each pass, the Python API, and
the notebooks, which are executed: an error in a cell ends the build. A link to a file that is no page becomes the path
of the file.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from doc_blocks import without_marks
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from public_api import public_names

from kvsurgeon.cli.main import run
from kvsurgeon.workflow.registry import BUILT_IN, COMMANDS

ROOT = Path(__file__).parents[1]
# Files of the repository, and where they are on the site.
NEIGHBORS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changes.md",
    "benchmarks/README.md": "benchmarks.md",
}
NOTEBOOKS = "notebooks"  # their folder in docs/
CELL_SECONDS = 300  # that a cell may take on a busy machine
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for source, page in NEIGHBORS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for page, content in (("commands", commands()), ("passes", passes()), ("python", python_api())):
        files.append(File.generated(config, f"reference/{page}.md", content=content))
    for path in sorted((ROOT / "docs").glob(f"{NOTEBOOKS}/*.ipynb")):
        text, images = executed(path)
        files.append(File.generated(config, f"{NOTEBOOKS}/{path.stem}.md", content=text))
        for name, image in images.items():
            files.append(File.generated(config, f"{NOTEBOOKS}/{name}", content=image))
    return files


def executed(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook with its outputs as Markdown, and the images that it shows.

    Raises:
        CellExecutionError: A cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=CELL_SECONDS, coalesce_streams=True, resources={"metadata": {"path": folder}}
        ).execute()
    names = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, found = MarkdownExporter().from_notebook_node(notebook, resources=names)
    return text, found["outputs"]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links of a page lead to other pages, wherever the file is in the repository.

    Marks of blocks that are for tests are removed.
    """
    known = {file.src_uri for file in files}
    here = page.file.src_uri
    sources = {on_site: source for source, on_site in NEIGHBORS.items()}
    source = sources.get(here, f"docs/{here}")

    def resolved(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        target = NEIGHBORS.get(path, path.removeprefix("docs/")).replace(".ipynb", ".md")
        if target in known:
            return f"[{text}]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{anchor or ''})"
        return text if f"`{path}" in text or path in text else f"{text} (`{path}`)"

    return LINK.sub(resolved, without_marks(markdown))


def commands() -> str:
    """Return the page on the commands: what `--help` prints for each."""
    lines = ["# Commands", "", "Each pass is a command too, with the same options as in a [pipeline](passes.md).", ""]
    for name in (*COMMANDS, *BUILT_IN):
        lines += [f"## {name}", "", "```text", _help(name), "```", ""]
    return "\n".join(lines)


def _help(command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = run([command, "--help"])
    logging.disable(logging.NOTSET)  # the command line silences it, and mkdocs counts warnings by it
    if code:
        raise RuntimeError(f"expected help of {command}, found exit code {code}")
    return printed.getvalue().strip()


def passes() -> str:
    """Return the page on the passes: the docstring of each, in the order of the registry."""
    lines = ["# Passes", "", 'In pipelines, as in `kvsurgeon run MODEL -p "inject{cache=static},fuse-attention"`.', ""]
    for name, reference in BUILT_IN.items():
        lines += [f"## {name}", "", f"::: {reference.replace(':', '.')}", "    options:"]
        lines += [
            f"      {option}: false" for option in ("show_root_heading", "show_root_toc_entry", "show_bases", "members")
        ]
        lines.append("")
    return "\n".join(lines)


def python_api() -> str:
    """Return the page on the Python API: every public name with its source, and the types of results."""
    lines = ["# Python", "", "`import kvsurgeon` provides these names; the types of results follow.", ""]
    for name, value in public_names().items():
        lines += [f"::: {value.__module__}.{value.__qualname__}", "    options:", "      heading_level: 2"]
        lines += [f"      heading: {name}", f"      toc_label: {name.removeprefix('kvsurgeon.')}"]
        lines += [f"      show_source: {str(inspect.isfunction(value)).lower()}", ""]
    return "\n".join(lines)
