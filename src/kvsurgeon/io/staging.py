"""Computed weights as a session reads them before anything is saved: in a file without a name, not in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.io.roundtrip import to_proto

OPEN_FILES = "/proc/self/fd"  # where Linux shows a process its open files
EMBEDDED = 64 * 2**20  # bytes of computed weights that are held in memory
_SMALLEST = 1 << 16  # bytes of one that is worth a place in the file


@contextmanager
def staged(model: ir.Model, near: str | Path | None = None) -> Iterator[onnx.ModelProto]:
    """Give the model as a proto for sessions; however much is to be computed for it, little of it is in memory.

    What is computed lies in a file that has no name, and is gone when the block ends, or the process does. External
    data that was there already is referred to as it is in `io.to_proto`.

    Args:
        model: The model, which is not changed.
        near: A folder, which need not be there yet, on the file system that has room.

    Raises:
        UsageError: There is no room.
    """
    computed = [value for value in model.graph.initializers.values() if _is_large(value.const_value)]
    if not os.path.isdir(OPEN_FILES) or sum(_tensor(value).nbytes for value in computed) <= EMBEDDED:
        yield to_proto(model)
        return
    folder = _existing(Path.cwd() if near is None else Path(near).absolute())
    with tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None) as file:
        yield _referring(model, computed, file)


def _referring(model: ir.Model, computed: Sequence[ir.Value], file: BinaryIO) -> onnx.ModelProto:
    """The model with references to what is now in the file."""
    tensors = [_tensor(value) for value in computed]
    try:
        references = [_written(tensor, file) for tensor in tensors]
        file.flush()
    except OSError as error:
        raise UsageError(
            f"cannot write what the judge is to read: {error.strerror or error}; choose another folder, or --no-verify"
        ) from error
    try:
        for value, reference in zip(computed, references, strict=True):
            value.const_value = reference
        return to_proto(model)
    finally:
        for value, tensor in zip(computed, tensors, strict=True):
            value.const_value = tensor


def _written(tensor: ir.LazyTensor, file: BinaryIO) -> ir.ExternalTensor:
    start = file.tell()
    tensor.tofile(file)
    shape = ir.Shape(tensor.shape.numpy())
    location = f"{OPEN_FILES}/{file.fileno()}"
    return ir.ExternalTensor(location, start, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or "")


def _is_large(tensor: ir.TensorProtocol | None) -> bool:
    return isinstance(tensor, ir.LazyTensor) and tensor.nbytes >= _SMALLEST and tensor.dtype.bitwidth >= 8


def _tensor(value: ir.Value) -> ir.LazyTensor:
    assert isinstance(value.const_value, ir.LazyTensor)
    return value.const_value


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.is_dir())
