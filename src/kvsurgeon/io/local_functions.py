"""Check that the local functions of a model can be inlined: they do not call themselves, and few nodes result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter

import onnx

from kvsurgeon.errors import InvalidModelError

_MOST_NODES = 500_000  # after inlining; the largest decoders have a fifth of it
_Key = tuple[str, str, str]  # domain, name, overload


def check_functions(proto: onnx.ModelProto) -> None:
    """Check the calls of local functions.

    Raises:
        InvalidModelError: Functions call each other in a cycle, or a graph without them would be too large: functions
            that call others several times grow exponentially.
    """
    if not proto.functions:
        return
    calls = {(f.domain, f.name, f.overload): _operators(f.node) for f in proto.functions}
    try:
        order = list(
            TopologicalSorter({key: found.keys() & calls.keys() for key, found in calls.items()}).static_order()
        )
    except CycleError as error:
        cycle = " -> ".join(f"`{name}`" for _, name, _ in error.args[1][:6])
        raise InvalidModelError(f"expected functions without recursion, found calls in a cycle: {cycle}") from None
    sizes: dict[_Key, int] = {}
    for key in order:
        sizes[key] = _inlined(calls[key], sizes)
    total = _inlined(_operators(proto.graph.node), sizes)
    if total > _MOST_NODES:
        largest = max(sizes, key=sizes.__getitem__)[1]
        raise InvalidModelError(
            f"expected at most {_MOST_NODES:,} nodes after inlining functions, found {total:,}, most of them in "
            f"`{largest}`, which calls functions repeatedly"
        )


def nested_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield nodes, each followed by those of its subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nested_nodes(graph.node)


def _operators(nodes: Iterable[onnx.NodeProto]) -> Counter[_Key]:
    return Counter((node.domain, node.op_type, node.overload) for node in nested_nodes(nodes))


def _inlined(operators: Counter[_Key], sizes: dict[_Key, int]) -> int:
    """Return the number of nodes after inlining; a call counts too, for an input that it passes through."""
    return sum(count * (1 + sizes.get(key, 0)) for key, count in operators.items())
