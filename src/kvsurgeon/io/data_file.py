"""Which weights leave the model file for a data file of their own, and how that is written: one tensor at a time."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from kvsurgeon.errors import UsageError
from kvsurgeon.io.atomic_write import Draft
from kvsurgeon.io.external_data import external_tensors
from kvsurgeon.io.locate import PROTOBUF_LIMIT
from kvsurgeon.io.progress import Report

_ROOM = 64 * 2**20  # bytes left for the graph itself
EMBED_LIMIT = PROTOBUF_LIMIT - _ROOM
_SMALLEST = 1024  # bytes; what is smaller stays in the graph, where shape inference can read it
_ALIGNMENT = 64  # bytes; so that a mapped tensor can be used in place


def leaving(model: ir.Model, *, pack: bool) -> tuple[ir.Value, ...]:
    """Return the initializers whose data goes into a new file.

    Packed, these are all of some size. Otherwise what is not computed yet goes beside data that lies outside already,
    and what is in memory stays in the model file while that is a legal protobuf.
    """
    if pack:
        return tuple(_initializers(model, lambda tensor: True))
    if _bytes_in_memory(model) > EMBED_LIMIT:
        return tuple(_initializers(model, _is_in_memory))
    if next(external_tensors(model), None) is not None:
        return tuple(_initializers(model, lambda tensor: isinstance(tensor, ir.LazyTensor)))
    return ()


def shared_or_leaving(models: Sequence[ir.Model], *, pack: bool) -> tuple[ir.Value, ...]:
    """Return the initializers of several models whose data goes into one new file.

    These are those that leave each of them, and what more than one holds in memory.
    """
    held = Counter(id(value.const_value) for model in models for value in _initializers(model, _is_in_memory))
    found = [value for model in models for value in leaving(model, pack=pack)]
    found += [
        value
        for model in models
        for value in _initializers(model, lambda tensor: _is_in_memory(tensor) and held[id(tensor)] > 1)
    ]
    return tuple({id(value): value for value in found}.values())


def _is_in_memory(tensor: ir.TensorProtocol) -> bool:
    return not isinstance(tensor, ir.ExternalTensor)


@contextmanager
def unloaded(values: Sequence[ir.Value], data: Path, draft: Draft, report: Report) -> Iterator[None]:
    """Let these initializers refer to the new data file `data` within the block; afterwards they are as they were.

    The file is written tensor by tensor, computed ones chunk by chunk; what two initializers share is written once.

    Raises:
        UsageError: There is no room for it, or it cannot be written.
    """
    tensors = [value.const_value for value in values if value.const_value is not None]
    references = _write(tensors, data, draft, report)
    try:
        for value, reference in zip(values, references, strict=True):
            value.const_value = reference
        yield
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


def free_name(target: Path, taken: Collection[str]) -> Path:
    """Return a data file for the model `target` that is not there, and bears none of the names that are taken."""
    name = target.with_name(f"{target.name}.data")
    number = 1
    while name.exists() or name.name in taken:
        number += 1
        name = target.with_name(f"{target.name}-{number}.data")
    return name


def _initializers(model: ir.Model, chosen: Callable[[ir.TensorProtocol], bool]) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes < _SMALLEST:
                continue
            in_main_graph = graph is model.graph or isinstance(tensor, ir.ExternalTensor)
            if in_main_graph and chosen(tensor):
                yield value


def _bytes_in_memory(model: ir.Model) -> int:
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    inside = (tensor for tensor in tensors if tensor is not None and not isinstance(tensor, ir.ExternalTensor))
    return sum(tensor.nbytes for tensor in inside if tensor.dtype != ir.DataType.STRING)


def _write(tensors: Sequence[ir.TensorProtocol], data: Path, draft: Draft, report: Report) -> list[ir.ExternalTensor]:
    distinct = {_identity(tensor): tensor for tensor in tensors}
    total = sum(tensor.nbytes for tensor in distinct.values())
    free = shutil.disk_usage(data.parent).free
    if free < total:
        raise UsageError(f"expected room for {total:,} bytes at `{data}`, found {free:,}; choose another folder")
    offsets: dict[object, int] = {}
    with draft.new(data, synced=False) as file:
        told = _Told(file, lambda done: report(data.name, done, total))
        for identity, tensor in distinct.items():
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offsets[identity] = file.tell()
            _put(tensor, told)
    return [_reference(tensor, data, offsets[_identity(tensor)]) for tensor in tensors]


def _identity(tensor: ir.TensorProtocol) -> object:
    """Return what is the same for tensors that have the same bytes: weights that are tied."""
    if isinstance(tensor, ir.ExternalTensor):
        return str(tensor.path), tensor.offset or 0, tensor.nbytes
    return id(tensor)


def _put(tensor: ir.TensorProtocol, file: _Told) -> None:
    if isinstance(tensor, ir.LazyTensor | ir.ExternalTensor):
        tensor.tofile(file)  # in chunks
    else:
        file.write(tensor.tobytes())


class _Told:
    """A file to which chunks are written, and somebody who is told of each."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], Any]) -> None:
        self._file = file
        self._tell = tell

    def write(self, chunk: bytes) -> int:
        """Write a chunk, and tell how many bytes the file has now."""
        written = self._file.write(chunk)
        self._tell(self._file.tell())
        return written


def _reference(tensor: ir.TensorProtocol, data: Path, offset: int) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        data.name,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
        base_dir=data.parent,
    )
