"""Provenance of a model, in the metadata of its file: which passes of which version made it from which graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from importlib.metadata import version
from typing import Any

import onnx_ir as ir

from kvsurgeon.io.json_files import parse_json
from kvsurgeon.passes.contract import Pass
from kvsurgeon.passes.options import text_of
from kvsurgeon.passes.weightless import weightless_proto, without_data

KEY = "kvsurgeon.provenance"
UNKNOWN = "unknown"  # digest of a graph that is not valid


def digest_of(model: ir.Model) -> str:
    """Return the SHA-256 of the graph of a model, with the types and shapes of its weights but not their data.

    Raises:
        InvalidModelError: The graph cannot be serialized.
    """
    proto = weightless_proto(model, without_data)
    return f"sha256:{hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()}"


def record_provenance(model: ir.Model, source: str, passes: Iterable[Pass]) -> None:
    """Add an entry to the metadata of a model: the tool, its version, the digest of the source, and the passes."""
    try:
        entries = parse_json(model.metadata_props.get(KEY, ""))
    except ValueError:
        entries = []
    entry = {"tool": f"kvsurgeon {version('kvsurgeon')}", "source": source, "passes": [*map(pass_text, passes)]}
    model.metadata_props[KEY] = json.dumps([*(entries if isinstance(entries, list) else []), entry])


def pass_text(one: Pass) -> str:
    """Return a pass with the options that are not at their defaults, as a text of a pipeline.

    >>> from kvsurgeon.passes.cache.inject import Inject
    >>> pass_text(Inject(cache="static", max_length=64)), pass_text(Inject())
    ('inject{cache=static,max_length=64}', 'inject')
    """
    options: tuple[Field[Any], ...] = fields(one) if is_dataclass(one) else ()  # another package's may be any class
    texts = {option.name: text_of(getattr(one, option.name)) for option in options if option.init}
    defaults = {option.name: text_of(option.default) for option in options}
    given = [f"{name}={_quoted(text)}" for name, text in texts.items() if text != defaults[name]]
    return f"{one.name}{{{','.join(given)}}}" if given else one.name


def _quoted(text: str) -> str:
    return f'"{text}"' if set(text) & set("{}=") else text
