"""Weights that live in memory: they stay in the model file while it stays a legal protobuf, else they get their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from kvsurgeon.io.atomic import replacing
from kvsurgeon.io.locate import PROTOBUF_LIMIT
from kvsurgeon.io.progress import Report

_ROOM = 64 * 2**20  # bytes left for the graph itself
EMBED_LIMIT = PROTOBUF_LIMIT - _ROOM
_SMALLEST = 1024  # bytes; what is smaller stays in the graph, where shape inference can read it
_ALIGNMENT = 64  # bytes; so that a mapped tensor can be used in place


def must_unload(model: ir.Model) -> bool:
    """Return whether the weights in memory would not fit into one protobuf file."""
    return sum(tensor.nbytes for value in _in_memory(model) if (tensor := value.const_value) is not None) > EMBED_LIMIT


@contextmanager
def unloaded(model: ir.Model, target: Path, report: Report, name: str | None = None) -> Iterator[None]:
    """Let the model refer to a data file beside `target` within the block; afterwards it is as it was.

    The file is written tensor by tensor, lazy ones being evaluated one at a time. It has the name that is asked for, or
    one that was free: what an older model file refers to is not touched.
    """
    values = [value for value in _in_memory(model) if value.const_value and value.const_value.nbytes >= _SMALLEST]
    tensors = [value.const_value for value in values if value.const_value is not None]
    data = _free_name(target) if name is None else target.with_name(name)
    references = _write(tensors, data, report)
    try:
        for value, reference in zip(values, references, strict=True):
            value.const_value = reference
        yield
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor


def _in_memory(model: ir.Model) -> Iterable[ir.Value]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.dtype != ir.DataType.STRING:
            yield value


def _free_name(target: Path) -> Path:
    name = target.with_name(f"{target.name}.data")
    number = 1
    while name.exists():
        number += 1
        name = target.with_name(f"{target.name}-{number}.data")
    return name


def _write(tensors: list[ir.TensorProtocol], data: Path, report: Report) -> list[ir.ExternalTensor]:
    total = sum(tensor.nbytes for tensor in tensors)
    references = []
    with replacing(data) as file:
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            references.append(_reference(tensor, data, file.tell()))
            file.write(tensor.tobytes())
            report(data.name, file.tell(), total)
    return references


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
