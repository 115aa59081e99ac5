"""The graph as text before and after each pass, for `--trace`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.passes.weightless import weightless_proto


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
        text = onnx.printer.to_text(weightless_proto(model, _without_data))
        (folder / f"{count:02}-{name}.txt").write_text(text, "utf-8")

    return write


def _without_data(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    shape = ir.Shape([] if tensor is None else tensor.shape.numpy())
    dtype = ir.DataType.FLOAT if tensor is None else tensor.dtype
    return ir.ExternalTensor("weights", None, None, dtype, shape=shape, name=value.name or "")
