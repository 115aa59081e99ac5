"""Order of nodes after an edit: old nodes keep theirs, and new nodes follow the ones that they read from."""

from __future__ import annotations

from collections.abc import Sequence

import onnx


def in_original_order(nodes: Sequence[onnx.NodeProto], origins: Sequence[int | None]) -> list[onnx.NodeProto]:
    """Return the nodes in their original order, each new one after the last node that it reads from.

    Args:
        nodes: The nodes.
        origins: The original index of each node; None if it is new.
    """
    index_of: dict[str, int] = {}
    for node, origin in zip(nodes, origins, strict=True):
        if origin is not None:
            index_of.update(dict.fromkeys(node.output, origin))
    keys = []
    for node, origin in zip(nodes, origins, strict=True):
        index = max((index_of.get(name, -1) for name in node.input), default=-1) if origin is None else origin
        index_of.update(dict.fromkeys(node.output, index))
        keys.append((index, origin is None))
    return [nodes[i] for i in sorted(range(len(nodes)), key=keys.__getitem__)]


def is_sorted(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Return whether each node is after those whose outputs it reads, also in its subgraphs."""
    later = {name for node in nodes for name in node.output if name}
    for node in nodes:
        if not later.isdisjoint(names_read(node)):
            return False
        later.difference_update(node.output)
    return True


def names_read(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads from its graph, also in its subgraphs."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            defined = {name for inner in graph.node for name in inner.output}
            names |= {name for inner in graph.node for name in names_read(inner)} - defined
    return names
