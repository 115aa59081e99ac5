"""Cache metadata of a model file: what a cache manager cannot read from the dimensions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import onnx_ir as ir

from kvsurgeon.cache.layout import DEFAULT_LAYOUT, Layout
from kvsurgeon.cache.pairs import CacheMode
from kvsurgeon.io.json_files import parse_json
from kvsurgeon.rewrite.cache_plan import CachePlan
from kvsurgeon.symbolic.dim_names import DimNames

KEY = "kvsurgeon.cache"
FIRST_CALL_KEY = "kvsurgeon.first_call"
CONTEXT_KEY = "kvsurgeon.context"  # how an application computes masks and position tables
_NAMES = {KEY: "outputs", FIRST_CALL_KEY: None, CONTEXT_KEY: "inputs"}  # where names of inputs and outputs are keys


@dataclass(frozen=True, kw_only=True)
class CacheMetadata:
    """Metadata of a cache.

    Attributes:
        mode: Cache mode.
        key_layout: Order of the axes of the cached keys.
        value_layout: Order of the axes of the cached values.
        max_length: Largest total length that the model supports, in tokens; None if there is no limit.
        batch_chunks: Whether a batch of several sequences can take more than one new token after a past.
        outputs: Dimensions of the outputs whose length is that of the cache and not the number of tokens.
        padding: Whether texts may have padding; not if the first position gives the number of past tokens.
        ragged: Whether the sequences of a batch may have different numbers of past tokens.
    """

    mode: CacheMode
    key_layout: Layout
    value_layout: Layout
    max_length: int | None
    batch_chunks: bool
    outputs: Mapping[str, DimNames]
    padding: bool = True
    ragged: bool = False


def cache_metadata(plan: CachePlan, *, batch_chunks: bool, outputs: Mapping[str, DimNames]) -> CacheMetadata | None:
    """Return the metadata of a cache; None for a dynamic cache of the default layout and of any length."""
    layouts = {tensor.is_key: tensor.layout for tensor in reversed(plan.tensors)}
    padding = plan.past_length != "positions"
    is_default = plan.max_length is None and batch_chunks and padding and set(layouts.values()) <= {DEFAULT_LAYOUT}
    if plan.cache_mode == "dynamic" and is_default:
        return None
    return CacheMetadata(
        mode=plan.cache_mode,
        key_layout=layouts.get(True, DEFAULT_LAYOUT),
        value_layout=layouts.get(False, DEFAULT_LAYOUT),
        max_length=plan.max_length,
        batch_chunks=batch_chunks,
        outputs=outputs,
        padding=padding,
        ragged=plan.token_rows is not None,
    )


def write_cache_metadata(model: ir.Model, metadata: CacheMetadata | None) -> None:
    """Write the metadata to a model, or remove it."""
    if metadata is None:
        model.metadata_props.pop(KEY, None)
    else:
        model.metadata_props[KEY] = json.dumps(asdict(metadata))


def write_first_call(model: ir.Model, closed: Mapping[str, int]) -> None:
    """Write to a model which inputs open a block in the first call, and what they hold for later tokens."""
    model.metadata_props[FIRST_CALL_KEY] = json.dumps(dict(closed))


def read_cache_metadata(model: ir.Model) -> CacheMetadata | None:
    """Return the cache metadata of a model without unknown fields; None if there is none, or if it cannot be read."""
    try:
        stored = parse_json(model.metadata_props.get(KEY, ""))
        known = {field.name: stored[field.name] for field in fields(CacheMetadata) if field.name in stored}
        known |= {name: tuple(known[name]) for name in ("key_layout", "value_layout")}
        return CacheMetadata(**known)
    except (ValueError, TypeError, KeyError):
        return None


def rename_in_metadata(model: ir.Model, renamed: Mapping[str, str]) -> None:
    """Replace the names of inputs and outputs in the metadata of a model by new ones."""
    for key, part in _NAMES.items():
        try:
            stored = parse_json(model.metadata_props.get(key, ""))
            names = stored if part is None else stored[part]
            new = {renamed.get(name, name): value for name, value in names.items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        model.metadata_props[key] = json.dumps(new if part is None else {**stored, part: new})
