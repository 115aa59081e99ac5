"""Weights inside a model file: leave them there on reading, and stream them into a new file on writing.

protobuf keeps a whole message in memory, and again as bytes while it reads or writes one. So large weights are cut out
of the bytes before protobuf parses them, and put into the bytes that it wrote. Source: the encoding of protocol
buffers, and the field numbers of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import onnx

_GRAPH, _INITIALIZER = 7, 5  # of ModelProto, of GraphProto
_DIMS, _TYPE, _NAME, _RAW, _DOC, _EXTERNAL, _LOCATION, _METADATA = 1, 2, 8, 9, 12, 13, 14, 16  # of TensorProto
_BYTES = 2  # wire type of a field with a length
_SMALLEST = 1 << 16  # bytes of a weight that stays in the file
_ONE_BYTE_OR_MORE = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20})

Stored = TypeVar("Stored")
Piece = bytes | memoryview


@dataclass(frozen=True, kw_only=True)
class _Field:
    number: int
    start: int  # of the tag
    payload: int
    end: int


def without_weights(view: memoryview, location: str) -> bytes | None:
    """Return the bytes of a model with references to the data of large initializers; None if there are none.

    Args:
        view: The bytes of the model file.
        location: Location of the references; their offsets are those in the file.

    Raises:
        ValueError: The bytes are no valid message.
    """
    found = False

    def shortened(tensor: _Field) -> list[Any]:
        nonlocal found
        fields = list(_fields(view, tensor.payload, tensor.end))
        raw = [field for field in fields if field.number == _RAW]
        simple = {field.number for field in fields} <= {_DIMS, _TYPE, _NAME, _RAW, _DOC, _METADATA}
        if len(raw) != 1 or not simple or raw[0].end - raw[0].payload < _SMALLEST or not _has_bytes(view, fields):
            return [view[tensor.payload : tensor.end]]
        found = True
        reference = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
        size = raw[0].end - raw[0].payload
        for key, value in (("location", location), ("offset", str(raw[0].payload)), ("length", str(size))):
            reference.external_data.add(key=key, value=value)
        return [view[tensor.payload : raw[0].start], view[raw[0].end : tensor.end], reference.SerializeToString()]

    pieces = _with_tensors(view, shortened)
    return b"".join(pieces) if found else None


def with_weights(view: memoryview, stored: Callable[[str], tuple[int, Stored] | None]) -> Iterator[Piece | Stored]:
    """Yield the parts of a model's bytes, with the data of initializers instead of references.

    Args:
        view: The bytes of the model.
        stored: Returns the size in bytes and the data of an initializer by name; None for one that stays as it is.
    """

    def completed(tensor: _Field) -> list[Any]:
        fields = list(_fields(view, tensor.payload, tensor.end))
        name = next((str(view[one.payload : one.end], "utf-8") for one in fields if one.number == _NAME), "")
        data = stored(name)
        if data is None:
            return [view[tensor.payload : tensor.end]]
        kept = [field for field in fields if field.number not in (_EXTERNAL, _LOCATION)]
        before = [view[one.start : one.end] for one in kept if one.number < _RAW]
        after = [view[one.start : one.end] for one in kept if one.number > _RAW]
        return [*before, _tag(_RAW), _varint_bytes(data[0]), data, *after]

    for piece in _with_tensors(view, completed):
        yield piece[1] if isinstance(piece, tuple) else piece


def _with_tensors(view: memoryview, change: Callable[[_Field], Sequence[Any]]) -> list[Any]:
    """Return the parts of a model's bytes with changed initializers, and the lengths that contain them."""
    pieces: list[Any] = []
    for field in _fields(view, 0, len(view)):
        if field.number != _GRAPH:
            pieces.append(view[field.start : field.end])
            continue
        graph: list[Any] = []
        for inner in _fields(view, field.payload, field.end):
            if inner.number != _INITIALIZER:
                graph.append(view[inner.start : inner.end])
            else:
                changed = change(inner)
                graph += [_tag(_INITIALIZER), _varint_bytes(_size(changed)), *changed]
        pieces += [_tag(_GRAPH), _varint_bytes(_size(graph)), *graph]
    return pieces


def _size(pieces: Sequence[Any]) -> int:
    return sum(piece[0] if isinstance(piece, tuple) else len(piece) for piece in pieces)


def _has_bytes(view: memoryview, fields: Sequence[_Field]) -> bool:
    """Whether the elements of a tensor are whole bytes."""
    kinds = [_varint(view, field.payload)[0] for field in fields if field.number == _TYPE]
    return bool(kinds) and kinds[-1] in _ONE_BYTE_OR_MORE


def _fields(view: memoryview, start: int, end: int) -> Iterator[_Field]:
    """Yield the fields of a message.

    Raises:
        ValueError: The bytes are no message.
    """
    at = start
    while at < end:
        tag, payload = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if wire == _BYTES:
            size, payload = _varint(view, payload)
            stop = payload + size
        elif wire == 0:
            stop = _varint(view, payload)[1]
        elif wire in (1, 5):
            stop = payload + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"unknown wire type {wire}")
        if stop > end or number == 0:
            raise ValueError("a field ends outside its message")
        yield _Field(number=number, start=at, payload=payload, end=stop)
        at = stop


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """Return a number and the index of the byte after it."""
    number, shift = 0, 0
    while at < len(view) and shift < 70:
        byte = view[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at
    raise ValueError("a number has no end")


def _varint_bytes(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def _tag(number: int) -> bytes:
    return _varint_bytes(number << 3 | _BYTES)
