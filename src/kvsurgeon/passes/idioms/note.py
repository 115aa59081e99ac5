"""What a file notes of its cache, for hosts that cannot tell it from dims: once they are numbers, nobody can."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import onnx_ir as ir

from kvsurgeon.passes.idioms.entries import USUAL, Entry

Name = Literal["grow", "in-place", "new-only"]

KEY = "kvsurgeon.cache"


@dataclass(frozen=True, kw_only=True)
class Note:
    """How a host must keep the cache."""

    idiom: Name
    key_axis: int  # of the tokens
    value_axis: int


def note_of(name: Name, entries: Sequence[Entry]) -> Note | None:
    """Return what is to be noted; nothing where the cache grows as most do."""
    axes = {("key" if entry.is_key else "value"): entry.axis for entry in reversed(entries)}
    if name == "grow" and all(entry.layout == USUAL for entry in entries):
        return None
    key = axes.get("key", 2)
    return Note(idiom=name, key_axis=key, value_axis=axes.get("value", key))


def write_note(model: ir.Model, note: Note | None) -> None:
    """Note it in the file's metadata; nothing clears what was there."""
    if note is None:
        model.metadata_props.pop(KEY, None)
    else:
        model.metadata_props[KEY] = json.dumps(asdict(note))


def read_note(model: ir.Model) -> Note | None:
    """Return what the file notes, if anything that can be read."""
    try:
        return Note(**json.loads(model.metadata_props.get(KEY, "")))
    except (ValueError, TypeError):
        return None
