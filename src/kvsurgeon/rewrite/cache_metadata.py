"""What a file notes of its cache, for hosts that cannot tell it from dims: once they are numbers, nobody can."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import onnx_ir as ir

from kvsurgeon.cache.layout import USUAL, Layout
from kvsurgeon.cache.pairs import CacheMode
from kvsurgeon.rewrite.cache_entries import CacheTensor
from kvsurgeon.rewrite.dimension_names import DimNames

KEY = "kvsurgeon.cache"


@dataclass(frozen=True, kw_only=True)
class CacheMetadata:
    """How a host must keep the cache."""

    mode: CacheMode
    key_layout: Layout
    value_layout: Layout
    max_length: int | None = None  # tokens that context can be computed for, where not for any number
    batch_chunks: bool = True  # whether several sequences at once take more than one token behind a past
    outputs: Mapping[str, DimNames] = field(
        default_factory=dict
    )  # dims of those with a place for each row that is read


def cache_metadata_of(
    name: CacheMode,
    entries: Sequence[CacheTensor],
    max_length: int | None,
    *,
    batch_chunks: bool = True,
    outputs: Mapping[str, DimNames] | None = None,
) -> CacheMetadata | None:
    """Return what is to be noted; nothing where the cache grows as most do, to any length."""
    layouts = {entry.is_key: entry.layout for entry in reversed(entries)}
    is_usual = max_length is None and batch_chunks and all(layout == USUAL for layout in layouts.values())
    if name == "dynamic" and is_usual:
        return None
    return CacheMetadata(
        mode=name,
        key_layout=layouts.get(True, USUAL),
        value_layout=layouts.get(False, USUAL),
        max_length=max_length,
        batch_chunks=batch_chunks,
        outputs=outputs or {},
    )


def write_cache_metadata(model: ir.Model, note: CacheMetadata | None) -> None:
    """CacheMetadata it in the file's metadata; nothing clears what was there."""
    if note is None:
        model.metadata_props.pop(KEY, None)
    else:
        model.metadata_props[KEY] = json.dumps(asdict(note))


def read_cache_metadata(model: ir.Model) -> CacheMetadata | None:
    """Return what the file notes, if anything that can be read."""
    try:
        said = json.loads(model.metadata_props.get(KEY, ""))
        said |= {name: tuple(said[name]) for name in ("key_layout", "value_layout")}
        return CacheMetadata(**said)
    except (ValueError, TypeError, KeyError):
        return None
