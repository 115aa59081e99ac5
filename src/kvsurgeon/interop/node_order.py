"""Where nodes stand: those that were there before keep their order, new ones follow what they read."""

from __future__ import annotations

from collections.abc import Sequence

import onnx


def in_original_order(nodes: Sequence[onnx.NodeProto], origins: Sequence[int | None]) -> list[onnx.NodeProto]:
    """Return `nodes` with those of known origin in that order, and each new one after the last that it reads from.

    Args:
        nodes: The nodes as they are listed now.
        origins: For each, its place before, or None if it is new.
    """
    places: dict[str, int] = {}
    for node, origin in zip(nodes, origins, strict=True):
        if origin is not None:
            places.update(dict.fromkeys(node.output, origin))
    keys = []
    for node, origin in zip(nodes, origins, strict=True):
        place = max((places.get(name, -1) for name in node.input), default=-1) if origin is None else origin
        places.update(dict.fromkeys(node.output, place))
        keys.append((place, origin is None))
    return [nodes[i] for i in sorted(range(len(nodes)), key=keys.__getitem__)]


def is_sorted(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether every node stands after those whose outputs it, or a body of it, reads."""
    ahead = {name for node in nodes for name in node.output if name}
    for node in nodes:
        if any(name in ahead for name in _reads(node)):
            return False
        ahead.difference_update(node.output)
    return True


def _reads(node: onnx.NodeProto) -> set[str]:
    names = set(node.input)
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            made = {name for inner in body.node for name in inner.output}
            names |= {name for inner in body.node for name in _reads(inner)} - made
    return names
