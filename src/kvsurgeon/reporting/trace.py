"""The graph as text before and after each pass, for `--trace`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.passes.weightless import weightless_proto, without_data


def trace_writer(folder: Path) -> Callable[[int, str, ir.Model], None]:
    """Return a pass callback that writes `00-original.txt`, `01-inject.txt`, ... into `folder`.

    Raises:
        UsageError: The folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to `{folder}`: {error.strerror or error}") from error

    def write(count: int, name: str, model: ir.Model) -> None:
        text = onnx.printer.to_text(weightless_proto(model, without_data))
        (folder / f"{count:02}-{name}.txt").write_text(text, "utf-8")

    return write
