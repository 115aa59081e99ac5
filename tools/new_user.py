"""Runs the docs as a new user does: each command and each snippet as it is written, in a clean virtual environment.

    python tools/new_user.py [PAGE...] [--with PACKAGE...]

The README runs first, from the copy of a clone: it installs the package. Every other page runs in a copy of its own,
with the model that the README exports, in a folder `model`. The environment has what the pages install, and nothing
else. Blocks that are marked by `skip="REASON"` are listed; those that need a package of `--with` run, such as those of
`--with torch transformers onnxscript`. The time to the first success ends with the README's third command on a model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doc_blocks import Block, blocks_of

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FIRST_SUCCESS = "kvsurgeon generate model-with-cache"  # in the block that ends with it
NOT_CLONED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", ".*_cache")


def main() -> int:
    """Run pages, print times and skipped blocks, and return an exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("pages", nargs="*", type=Path, help="pages after the README; by default all of docs/")
    parser.add_argument("--with", dest="packages", nargs="+", default=[], help="packages whose blocks run too")
    parser.add_argument("--page", type=Path, help=argparse.SUPPRESS)  # run this page in this process
    arguments = parser.parse_args()
    if arguments.page is not None:
        run_page(arguments.page, arguments.packages)
        return 0
    pages = dict.fromkeys([README, *(page.resolve() for page in arguments.pages or sorted(ROOT.glob("docs/**/*.md")))])
    with tempfile.TemporaryDirectory() as folder:
        return run_all(list(pages), Path(folder), arguments.packages)


def run_all(pages: list[Path], folder: Path, packages: list[str]) -> int:
    """Run pages in copies of a clone, and return an exit code."""
    start, failed = time.time(), []
    environment = create_environment(folder / "venv", start)
    if packages:
        subprocess.run([folder / "venv" / "bin" / "pip", "install", "--quiet", *packages], check=True)
    for page in [page for page in pages if any(block.runs for block in blocks_of(page))]:
        name = page.relative_to(ROOT).as_posix()
        place = folder / name
        shutil.copytree(ROOT, place, ignore=NOT_CLONED)
        if page != README:
            shutil.copytree(folder / "README.md" / "model", place / "model")
        begin = time.time()
        command = [
            str(folder / "venv" / "bin" / "python"),
            __file__,
            "--page",
            str(page),
            *(["--with", *packages] if packages else []),
        ]
        with (folder / "output").open("w+") as output:
            code = subprocess.run(
                command, cwd=place, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
            output.seek(0)
            shown = output.read()
        print(f"{'failed' if code else 'ok    '} {time.time() - begin:6.1f} s  {name}", flush=True)
        if code:
            print(shown[-6000:], flush=True)
            failed.append(name)
            if page == README:
                break
        elif page == README:
            print(*(line for line in shown.splitlines() if line.startswith("first success")), sep="\n", flush=True)
    for block in skipped(pages):
        print(f"skipped {block.page.relative_to(ROOT).as_posix()}:{block.line}: {block.skip}")
    print(f"{time.time() - start:.0f} s, {len(failed)} pages failed")
    return 1 if failed else 0


def create_environment(folder: Path, start: float) -> dict[str, str]:
    """Create a virtual environment, and return the variables of a shell in which it is active."""
    venv.create(folder, with_pip=True)
    variables = {name: text for name, text in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return variables | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{variables['PATH']}",
        "VIRTUAL_ENV": str(folder),
        "STARTED": str(start),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }


def run_page(page: Path, packages: list[str]) -> None:
    """Run the blocks of a page in the working directory, those that need `packages` too; an error ends the process."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.title is not None:
            Path(block.title).write_text(block.code, "utf-8")
        if not block.runs and block.skip not in [f"needs {package}" for package in packages]:
            continue
        print(f"== {page.name}:{block.line}", flush=True)
        begin = time.time()
        if block.language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True)
        else:
            exec(compile(block.code, f"{page.name}:{block.line}", "exec"), names)
        print(f"== {time.time() - begin:.1f} s", flush=True)
        if FIRST_SUCCESS in block.code:
            print(f"first success after {time.time() - float(os.environ['STARTED']):.0f} s", flush=True)


def skipped(pages: list[Path]) -> Iterator[Block]:
    """Yield the blocks that do not run, each with its reason."""
    for page in pages:
        yield from (block for block in blocks_of(page) if block.skip is not None)


if __name__ == "__main__":
    sys.exit(main())
