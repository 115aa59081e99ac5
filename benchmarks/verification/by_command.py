"""Run the command line: exit code, messages and written files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from kvsurgeon.errors import KvsurgeonError
from verification.corpus import Entry

SECONDS = 120


class DeclinedError(KvsurgeonError):
    """The command rejected the model as documented: one line with a code."""

    def __init__(self, line: str, exit_code: int) -> None:
        message, _, code = line.strip().removeprefix("kvsurgeon: error: ").removesuffix("]").rpartition(" [")
        self.exit_code = exit_code  # type: ignore[misc]
        self.code = code  # type: ignore[assignment]
        super().__init__(message)


class IllBehavedError(Exception):
    """The command did not end as documented."""


def inject_by_command(entry: Entry) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a model and what `kvsurgeon inject` writes of it, verified by the command before.

    Raises:
        DeclinedError: It exits with 3 or 4, one line that names a value, a layer or the file, and nothing written.
        IllBehavedError: It ends in any other way.
    """
    with TemporaryDirectory() as folder:
        output = Path(folder) / "injected"
        command = [str(Path(sys.executable).with_name("kvsurgeon")), "inject", str(entry.folder), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode == 0:
            written = next(output.glob("*.onnx"))
            return onnx.load(entry.path, load_external_data=False), onnx.load(written, load_external_data=False)
        if faults := list(_faults(done, entry, output)):
            raise IllBehavedError(f"{'; '.join(faults)}: {done.stderr[:300]}")
    raise DeclinedError(done.stderr, done.returncode)


def _faults(done: subprocess.CompletedProcess[str], entry: Entry, output: Path) -> Iterator[str]:
    if done.returncode not in (3, 4):
        yield f"exit code {done.returncode}"
    if len(done.stderr.splitlines()) != 1:
        yield f"{len(done.stderr.splitlines())} lines"
    if "Traceback" in done.stderr + done.stdout:
        yield "a traceback"
    if output.exists():
        yield "something was written"
    if not names_a_place(done.stderr, entry):
        yield "no value, layer or file named"
    if not re.search(r" \[KVS-\d+\]$", done.stderr.strip()):
        yield "no code"


def names_a_place(message: str, entry: Entry) -> bool:
    """Whether a message names a value of the model, one of its layers, or its file."""
    quoted = set(re.findall(r"`([^`]+)`", message))
    return bool(re.search(r"\blayer \d", message) or quoted & _names(entry) or str(entry.folder) in message)


def _names(entry: Entry) -> set[str]:
    try:
        graph = onnx.load(entry.path, load_external_data=False).graph
    except Exception:  # then only the file can be named
        return set()
    made = {name for node in graph.node for name in (*node.input, *node.output)}
    return made | {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
