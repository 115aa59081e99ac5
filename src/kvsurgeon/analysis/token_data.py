"""Walks along token data: upstream to projections, and downstream over a growing region of nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import onnx_ir as ir

from kvsurgeon.analysis.token_flow import TokenFlow
from kvsurgeon.dataflow.value_kinds import ValueKind
from kvsurgeon.graph.query import upstream
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait


def is_token(flow: TokenFlow, value: ir.Value | None) -> bool:
    """Return whether a value is token data."""
    return value is not None and flow.kinds.get(value) is ValueKind.TOKEN


def token_inputs(flow: TokenFlow, node: ir.Node) -> list[ir.Value]:
    """Return the inputs of a node that are token data, each once."""
    return list(dict.fromkeys(value for value in node.inputs if value is not None and is_token(flow, value)))


def upstream_tokens(
    flow: TokenFlow, value: ir.Value | None, *, stop: Callable[[ir.Value], bool] | None = None
) -> Iterator[ir.Value]:
    """Yield a value and the token data it is computed from, nearest first, up to the results of projections.

    Args:
        flow: The flow of tokens.
        value: Where to start; None for nothing.
        stop: Another end: a value for which this is true is yielded, but nothing that it is computed from.
    """

    def inputs(node: ir.Node) -> list[ir.Value]:
        return [] if has_trait(node, Trait.PROJECTION) else token_inputs(flow, node)

    return upstream([value], stop=stop, inputs=inputs)


def growing_regions(flow: TokenFlow, start: ir.Node) -> Iterator[list[ir.Node]]:
    """Yield a list of the node, then the same list each time a node that reads its results is added, in order."""
    region, computed = [start], set(start.outputs)
    yield region
    for node in list(flow.order)[flow.order[start] + 1 :]:
        if any(value in computed for value in node.inputs):
            region.append(node)
            computed.update(node.outputs)
            yield region


def with_upstream(flow: TokenFlow, region: Collection[ir.Node], belongs: Callable[[ir.Value], bool]) -> list[ir.Node]:
    """Return a region with the nodes whose results it reads and that belong to it, in execution order."""
    inside, pending = set(region), list(region)
    while pending:
        for value in pending.pop().inputs:
            node = None if value is None else value.producer()
            if value is not None and node is not None and node not in inside and belongs(value):
                inside.add(node)
                pending.append(node)
    return sorted(inside, key=lambda node: flow.order[node])


def is_closed_but_for_shapes(flow: TokenFlow, region: Sequence[ir.Node]) -> bool:
    """Return whether only the first output of the last node is read outside, except for shapes, which are known."""
    inside, result = set(region), region[-1].outputs[0]
    users = (user for node in region for value in node.outputs if value is not result for user, _ in value.uses())
    return all(user in inside or is_shape_only(user) or user not in flow.read_for_content for user in users)


def is_closed(region: Sequence[ir.Node], results: Collection[ir.Value]) -> bool:
    """Return whether only the results of a region are read outside it."""
    inside = set(region)
    internal = (value for node in region for value in node.outputs if value not in results)
    return all(user in inside for value in internal for user, _ in value.uses())
