"""Build the report page of a model, alone or next to another one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvsurgeon.errors import UnsupportedError
from kvsurgeon.io.atomic_write import atomic_open, check_new_file
from kvsurgeon.io.loading import Source
from kvsurgeon.parity import Effort, Progress, Report
from kvsurgeon.reporting.page.render import PageOptions, render_page
from kvsurgeon.reporting.page.sides import Side
from kvsurgeon.runtime.text import Prompt
from kvsurgeon.workflow.verification import verify_models


def build_page(
    source: Source,
    output: str | Path | None = None,
    *,
    against: Source | None = None,
    prompt: Prompt | None = None,
    tokens: int = 32,
    verify: bool = False,
    effort: Effort = "normal",
    seed: int | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> str:
    """Return an HTML page on a model, and write it to `output` if one is given; see `kvsurgeon.report`."""
    if output is not None:
        check_new_file(Path(output), ".html", ".htm")
    first, note = Side(source, folder=folder), None
    sides, measured = [first], [first]
    if against is not None:
        measured = sides = [first, Side(against, folder=folder)]
    elif not first.has_cache:
        try:
            sides = [first, first.injected()]
        except UnsupportedError as error:
            note = f"No cache can be added: {error}"
    verification = _verify(sides, effort, seed, progress) if verify and len(sides) > 1 else None
    options = PageOptions(prompt=prompt, tokens=tokens, verification=verification, note=note)
    page = render_page(sides, measured, options)
    if output is not None:
        with atomic_open(Path(output)) as file:
            file.write(page.encode())
    return page


def _verify(sides: Sequence[Side], effort: Effort, seed: int | None, progress: Progress | None) -> Report:
    before, after = sides
    folder = None if after.folder is None else Path(after.folder)
    return verify_models(before.source, after.source, folder=folder, effort=effort, seed=seed, progress=progress)
