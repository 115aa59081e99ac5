"""Compare protobuf messages up to what onnx-ir changes: order of metadata, and fields set to their default."""

from __future__ import annotations

from typing import Any

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

_SCALAR = (bool, int, float, str, bytes)
_PAIRS = frozenset({"metadata_props", "quant_parameter_tensor_names"})
_EXTERNAL_KEYS = frozenset({"location", "offset", "length"})  # the keys of a reference that onnx-ir keeps


def is_equivalent(first: Any, second: Any) -> bool:
    """Return whether messages are equal up to the order of metadata and fields set to their default."""
    return bool(first == second or _normalized(first) == _normalized(second))


def restore_scalars(message: Any, original: Any) -> None:
    """Set fields to their default explicitly as the original does, and restore the order of equal metadata."""
    for field, value in original.ListFields():
        if isinstance(value, _SCALAR) and value == field.default_value and not message.HasField(field.name):
            setattr(message, field.name, value)
    if _pairs(message.metadata_props) == _pairs(original.metadata_props):
        del message.metadata_props[:]
        message.metadata_props.extend(original.metadata_props)


def deduplicate_metadata(tensor: onnx.TensorProto) -> None:
    """Remove repeated metadata entries: onnx-ir 1.1 writes those of an embedded tensor twice."""
    if tensor.metadata_props:
        once = _pairs(tensor.metadata_props)
        del tensor.metadata_props[:]
        for key, value in once.items():
            tensor.metadata_props.add(key=key, value=value)


def _pairs(entries: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}


def _normalized(message: Any) -> dict[str, Any]:
    """Return the content of a message as nested lists and dicts, without defaults."""
    content: dict[str, Any] = {}
    for field, value in message.ListFields():
        name = field.name
        if name in _PAIRS:
            content[name] = _pairs(value)
        elif name == "external_data":
            content[name] = {key: text for key, text in _pairs(value).items() if key in _EXTERNAL_KEYS}
        elif name == "output" and isinstance(message, onnx.NodeProto):
            content[name] = _without_trailing_blanks(value)
        elif isinstance(value, Message):
            content[name] = _normalized(value)
        elif not isinstance(value, _SCALAR):
            content[name] = [_normalized(item) if isinstance(item, Message) else item for item in value]
        elif not _is_default(field, value):
            content[name] = value
    return content


def _is_default(field: Any, value: Any) -> bool:
    if field.name == "domain" and value == "ai.onnx":
        return True
    return bool(value == field.default_value and field.containing_oneof is None)


def _without_trailing_blanks(names: Any) -> list[str]:
    kept = list(names)
    while kept and not kept[-1]:
        del kept[-1]
    return kept
