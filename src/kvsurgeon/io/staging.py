"""Run a model with computed weights before it is saved: the weights are in an unnamed file, not in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.io.data_file import refer_to, references_to
from kvsurgeon.io.roundtrip import to_proto

OPEN_FILES = "/proc/self/fd"  # the open files of a process on Linux
EMBEDDED = 64 * 2**20  # bytes of computed weights that stay in memory
_SMALLEST = 1 << 16  # bytes of a weight that is written to the file


@contextmanager
def staged(model: ir.Model, near: str | Path | None = None, folder: Path | None = None) -> Iterator[onnx.ModelProto]:
    """Return a model as a proto that onnxruntime can load in the block, with little of its computed weights in memory.

    Computed weights are in a file without a name, which is gone at the end of the block or of the process. Other
    external data is referred to as in `io.to_proto`.

    Args:
        model: The model, which is not changed.
        near: A folder on the file system to use. It need not exist.
        folder: The folder of external data.

    Raises:
        UsageError: The disk is full.
    """
    computed = [value for value in model.graph.initializers.values() if _is_large(value.const_value)]
    if not os.path.isdir(OPEN_FILES) or sum(_tensor(value).nbytes for value in computed) <= EMBEDDED:
        yield to_proto(model, folder)
        return
    home = _existing(Path.cwd() if near is None else Path(near).absolute())
    with tempfile.TemporaryFile(dir=home if os.access(home, os.W_OK) else None) as file:
        try:
            references = [_write(_tensor(value), file) for value in computed]
            file.flush()
        except OSError as error:
            reason = f"cannot write weights for verification: {error.strerror or error}"
            raise UsageError(f"{reason}; choose another folder, or --no-verify") from error
        with references_to(computed, references):
            proto = to_proto(model, folder)
        yield proto


def _write(tensor: ir.LazyTensor, file: BinaryIO) -> ir.ExternalTensor:
    start = file.tell()
    tensor.tofile(file)
    return refer_to(tensor, f"{OPEN_FILES}/{file.fileno()}", start)


def _is_large(tensor: ir.TensorProtocol | None) -> bool:
    return isinstance(tensor, ir.LazyTensor) and tensor.nbytes >= _SMALLEST and tensor.dtype.bitwidth >= 8


def _tensor(value: ir.Value) -> ir.LazyTensor:
    assert isinstance(value.const_value, ir.LazyTensor)
    return value.const_value


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.is_dir())
