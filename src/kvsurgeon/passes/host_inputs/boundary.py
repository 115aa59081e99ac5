"""Where context meets what depends on the text, in a graph that has a cache."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.dataflow.input_roles import required_inputs
from kvsurgeon.errors import UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.operators import SHAPE_ONLY
from kvsurgeon.graph.query import all_inputs

# Operators whose further inputs say how, not what: sizes, places, counts.
_SAYS_HOW = frozenset({
    "Reshape", "Expand", "Tile", "Unsqueeze", "Squeeze", "Split", "Pad", "TopK", "Slice", "ReduceSum", "ReduceMean",
})  # fmt: skip


def text_and_cache(graph: ir.Graph) -> tuple[ir.Value, list[ir.Value]]:
    """Return the input that carries the text, and those of the cache.

    Raises:
        UnsupportedError: It has no cache.
    """
    inputs = required_inputs(graph)
    cache = [value for value in inputs if len(value.shape or ()) == 4]
    if not cache or inputs[0] in cache:
        raise UnsupportedError("context can be given to a model with a cache alone", hint="inject first")
    return inputs[0], cache


def find_frontier(graph: ir.Graph) -> list[ir.Value]:
    """Return the values that depend on lengths, masks or positions, and not on the text, where these two meet.

    Where rows of a table of weights are looked up it is their places that are returned: the table stays.
    """
    text, cache = text_and_cache(graph)
    carriers = {text, *cache}
    varying = set(required_inputs(graph))
    found: dict[ir.Value, None] = {}
    for node in graph:
        if any(value in varying for value in all_inputs(node)):
            varying.update(node.outputs)
        if node.op_type in SHAPE_ONLY or not any(value in carriers for value in all_inputs(node)):
            continue
        carriers.update(node.outputs)
        for place, value in enumerate(node.inputs):
            if value is None or value in carriers or value not in varying:
                continue
            if not (node.op_type in _SAYS_HOW and place):
                found[_places_of_rows(value)] = None
    return list(found)


def cone_of(values: Sequence[ir.Value]) -> list[ir.Node]:
    """Return every node that the values are computed by."""
    found: dict[ir.Node, None] = {}
    pending = list(values)
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in found:
            found[node] = None
            pending += all_inputs(node)
    return list(found)


def _places_of_rows(value: ir.Value) -> ir.Value:
    """The indices with which learnt rows of a table are looked up, if that is what a value is."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Gather" or node.inputs[1] is None:
        return value
    tensor = constant_tensor(node.inputs[0])
    table = tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point()
    return node.inputs[1] if table and _is_added(value) else value


def _is_added(value: ir.Value) -> bool:
    """Whether rows are added to what they meet, as learnt positions are; rotary tables are multiplied with it."""
    users = [node for node, _ in value.uses()]
    return all(node.op_type == "Add" or (node.op_type == "Identity" and _is_added(node.outputs[0])) for node in users)
