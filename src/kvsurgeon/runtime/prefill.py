"""A second model, `prefill.onnx`, that computes the cache of a prompt by a part of the nodes of the model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx

from kvsurgeon.io.locate import PREFILL_FILE, read_proto
from kvsurgeon.runtime.decoder import CachedDecoder
from kvsurgeon.runtime.session import Session, open_session


def open_prefill(decoder: CachedDecoder, path: Path, **options: Any) -> Session | None:
    """Return the second model in the folder of a decoder; None if there is none that is a part of the decoder.

    A file of that name that another model left there is not.

    Args:
        decoder: The model with a cache.
        path: Its file.
        **options: Options of `open_session`.

    Raises:
        InputError: A file is not a model.
    """
    other = path.with_name(PREFILL_FILE)
    if other == path or not other.is_file():
        return None
    presents = {entry.present for entry in decoder.cache}
    return open_session(other, **options) if _is_part(read_proto(other), read_proto(path), presents) else None


def _is_part(part: onnx.ModelProto, whole: onnx.ModelProto, outputs: Collection[str]) -> bool:
    """Whether a model has the inputs of another, some of its outputs, and of its nodes and weights none but its own."""
    graph, other = part.graph, whole.graph
    nodes = {tuple(node.output): _computation(node) for node in other.node}
    weights = {one.name: one.SerializeToString(deterministic=True) for one in other.initializer}
    functions = {one.SerializeToString(deterministic=True) for one in whole.functions}
    opsets, given = ({(one.domain, one.version) for one in model.opset_import} for model in (part, whole))
    return (
        opsets <= given
        and {one.name for one in graph.output} == outputs
        and {one.name for one in graph.input} == {one.name for one in other.input}
        and not graph.sparse_initializer
        and all(nodes.get(tuple(node.output)) == _computation(node) for node in graph.node)
        and all(weights.get(one.name) == one.SerializeToString(deterministic=True) for one in graph.initializer)
        and all(one.SerializeToString(deterministic=True) in functions for one in part.functions)
    )


def _computation(node: onnx.NodeProto) -> bytes:
    """Return a node without what does not change its results."""
    bare = onnx.NodeProto(op_type=node.op_type, domain=node.domain, overload=node.overload, input=node.input)
    bare.attribute.extend(node.attribute)
    return bytes(bare.SerializeToString(deterministic=True))
