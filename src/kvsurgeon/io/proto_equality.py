"""When do two messages say the same, however they are dim_names?"""

from __future__ import annotations

from typing import Any

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

_SCALAR = (bool, int, float, str, bytes)
_PAIRS = frozenset({"metadata_props", "quant_parameter_tensor_names"})
_EXTERNAL_KEYS = frozenset({"location", "offset", "length"})  # what onnx-ir keeps of a reference


def says_the_same(one: Any, other: Any) -> bool:
    """Return whether the messages differ in nothing but spelling: order of metadata, fields set to their default."""
    return bool(one == other or _plain(one) == _plain(other))


def words_as_they_came(message: Any, original: Any) -> None:
    """Set texts and numbers to their default where the original does, and metadata into its order, if they agree."""
    for field, value in original.ListFields():
        if isinstance(value, _SCALAR) and value == field.default_value and not message.HasField(field.name):
            setattr(message, field.name, value)
    if _pairs(message.metadata_props) == _pairs(original.metadata_props):
        del message.metadata_props[:]
        message.metadata_props.extend(original.metadata_props)


def metadata_once(tensor: onnx.TensorProto) -> None:
    """Leave each metadata entry once: onnx-ir 1.1 writes those of an embedded tensor twice."""
    if not tensor.metadata_props:
        return
    once = {entry.key: entry.value for entry in tensor.metadata_props}
    del tensor.metadata_props[:]
    for key, value in once.items():
        tensor.metadata_props.add(key=key, value=value)


def _pairs(entries: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}


def _plain(message: Any) -> dict[str, Any]:
    """Return what the message says, as nested lists and dicts without the defaults."""
    said: dict[str, Any] = {}
    for field, value in message.ListFields():
        name = field.name
        if name in _PAIRS:
            said[name] = _pairs(value)
        elif name == "external_data":
            said[name] = {key: text for key, text in _pairs(value).items() if key in _EXTERNAL_KEYS}
        elif name == "output" and isinstance(message, onnx.NodeProto):
            said[name] = _without_trailing_blanks(value)
        elif isinstance(value, Message):
            said[name] = _plain(value)
        elif not isinstance(value, _SCALAR):
            said[name] = [_plain(item) if isinstance(item, Message) else item for item in value]
        elif not _is_default(field, value):
            said[name] = value
    return said


def _is_default(field: Any, value: Any) -> bool:
    if field.name == "domain" and value == "ai.onnx":
        return True
    return bool(value == field.default_value and field.containing_oneof is None)


def _without_trailing_blanks(names: Any) -> list[str]:
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept
