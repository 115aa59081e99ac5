"""Write weights to a new data file, one tensor at a time, and refer to it from the model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.io.atomic_write import FileTransaction
from kvsurgeon.io.external_data import external_tensors
from kvsurgeon.io.locate import PROTOBUF_LIMIT
from kvsurgeon.io.progress import OnProgress

EMBED_LIMIT = PROTOBUF_LIMIT - 64 * 2**20  # bytes of weights in the model file; the graph gets the rest
_SMALLEST = 1024  # bytes; smaller tensors stay in the graph, where shape inference can read them
_ALIGNMENT = 64  # bytes; so that a mapped tensor can be used in place


def weights_to_write(models: Sequence[ir.Model], *, pack: bool) -> tuple[ir.Value, ...]:
    """Return the initializers whose data goes into a new data file, for models that share it.

    With `pack` these are all of some size. Otherwise they are the computed ones of models with external data, those in
    memory of a model too large for one protobuf, and those that several models have in memory.
    """
    found = [value for model in models for value in _weights_of(model, pack=pack)]
    if len(models) > 1:
        embedded = [value for model in models for value in _initializers(model, _is_embedded)]
        counts = Counter(id(value.const_value) for value in embedded)
        found += [value for value in embedded if counts[id(value.const_value)] > 1]
    return tuple({id(value): value for value in found}.values())


def _weights_of(model: ir.Model, *, pack: bool) -> Iterator[ir.Value]:
    if pack:
        return _initializers(model, lambda tensor: True)
    if _embedded_bytes(model) > EMBED_LIMIT:
        return _initializers(model, _is_embedded)
    if next(external_tensors(model), None) is not None:
        return _initializers(model, lambda tensor: isinstance(tensor, ir.LazyTensor))
    return iter(())


def _is_embedded(tensor: ir.TensorProtocol) -> bool:
    return not isinstance(tensor, ir.ExternalTensor)


@contextmanager
def written_to_file(
    values: Sequence[ir.Value], data: Path, transaction: FileTransaction, on_progress: OnProgress
) -> Iterator[None]:
    """Write initializers to a new data file, and make them refer to it in the block.

    Tensors are written one by one, computed ones in chunks, and tensors of the same data once.

    Raises:
        UsageError: The disk is full, or the file cannot be written.
    """
    tensors = [value.const_value for value in values if value.const_value is not None]
    with references_to(values, _write(tensors, data, transaction, on_progress)):
        yield


@contextmanager
def references_to(values: Sequence[ir.Value], references: Sequence[ir.ExternalTensor]) -> Iterator[None]:
    """Replace the tensors of initializers by references to written data in the block."""
    tensors = [value.const_value for value in values]
    try:
        for value, reference in zip(values, references, strict=True):
            value.const_value = reference
        yield
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


def _initializers(model: ir.Model, chosen: Callable[[ir.TensorProtocol], bool]) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < _SMALLEST:
                continue
            if (graph is model.graph or isinstance(tensor, ir.ExternalTensor)) and chosen(tensor):
                yield value


def _embedded_bytes(model: ir.Model) -> int:
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    embedded = (tensor for tensor in tensors if tensor is not None and not isinstance(tensor, ir.ExternalTensor))
    return sum(tensor.nbytes for tensor in embedded if tensor.dtype != ir.DataType.STRING)


def _write(
    tensors: Sequence[ir.TensorProtocol], data: Path, transaction: FileTransaction, on_progress: OnProgress
) -> list[ir.ExternalTensor]:
    distinct = {_identity(tensor): tensor for tensor in tensors}
    total = sum(tensor.nbytes for tensor in distinct.values())
    check_space(data, total)
    offsets: dict[object, int] = {}
    with transaction.create(data, synced=False) as file:
        reporting = _reporting(file, lambda done: on_progress(data.name, done, total))
        for identity, tensor in distinct.items():
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offsets[identity] = file.tell()
            if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor | ir.Tensor):
                tensor.tofile(reporting)  # in chunks
            else:
                reporting.write(tensor.tobytes())
    return [refer_to(tensor, data.name, offsets[_identity(tensor)], base_dir=data.parent) for tensor in tensors]


def check_space(path: Path, size: int) -> None:
    """Check that a file of a size fits on the disk.

    Raises:
        UsageError: It does not.
    """
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise UsageError(f"expected {size:,} bytes of free space for `{path}`, found {free:,}; choose another folder")


def _reporting(file: BinaryIO, on_write: Callable[[int], None]) -> Any:
    """Return a writer to a file that reports the size of the file after each chunk."""

    def write(chunk: bytes) -> int:
        written = file.write(chunk)
        on_write(file.tell())
        return written

    return SimpleNamespace(write=write)


def _identity(tensor: ir.TensorProtocol) -> object:
    """Return a key that is equal for tensors with the same stored data, such as tied weights."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.path), tensor.offset or 0, tensor.nbytes
    return id(tensor)


def refer_to(tensor: ir.TensorProtocol, location: str, offset: int, base_dir: Path | str = "") -> ir.ExternalTensor:
    """Return an external tensor for the data of a tensor that was written to a file."""
    return ir.ExternalTensor(
        location, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name or "",
        doc_string=tensor.doc_string, metadata_props=dict(tensor.metadata_props) or None, base_dir=base_dir,
    )  # fmt: skip
