"""Boundary between context and token data in a graph with a cache."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import required_inputs
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.constants import constant_tensor
from kvsurgeon.graph.query import all_inputs, through
from kvsurgeon.ops.content import is_shape_only
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait


def token_and_cache_inputs(graph: ir.Graph) -> tuple[ir.Value, list[ir.Value]]:
    """Return the token input and the cache inputs.

    Raises:
        UnsupportedError: The graph has no cache.
    """
    inputs = required_inputs(graph)
    caches = [value for value in inputs if len(value.shape or ()) == 4]
    if not caches or inputs[0] in caches:
        raise UnsupportedError(
            "only a model with a cache can have its context as inputs", code=Code.PASS_PRECONDITION,
            hint="inject a cache first",
        )  # fmt: skip
    return inputs[0], caches


def find_boundary(graph: ir.Graph, tokens: ir.Value, caches: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the context that is combined with token data; for a lookup in a table of weights, the indices."""
    return list(dict.fromkeys(map(_lookup_indices, find_context(graph, tokens, caches))))


def find_context(graph: ir.Graph, tokens: ir.Value, caches: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the values that depend on lengths, masks or positions only, and are combined with token data."""
    token_data = {tokens, *caches}
    varying = set(required_inputs(graph))
    found: dict[ir.Value, None] = {}
    for node in graph:
        inputs = all_inputs(node)
        if any(value in varying for value in inputs):
            varying.update(node.outputs)
        if is_shape_only(node) or not any(value in token_data for value in inputs):
            continue
        token_data.update(node.outputs)
        for value in node.inputs[: 1 if has_trait(node, Trait.PARAMETERIZED) else None]:
            if value is not None and value not in token_data and value in varying:
                found[value] = None
    return list(found)


def _lookup_indices(value: ir.Value) -> ir.Value:
    """Return the indices of a lookup in a table of learned positions; any other value is returned as it is."""
    node = through(value, ("Identity",)).producer()
    if node is None or node.op_type != "Gather" or node.inputs[1] is None:
        return value
    tensor = constant_tensor(node.inputs[0])
    is_table = tensor is not None and len(tensor.shape) == 2 and tensor.dtype.is_floating_point()
    return node.inputs[1] if is_table and _is_added(value) else value


def _is_added(value: ir.Value) -> bool:
    """Return whether a value is only added to others, as learned positions are; rotary tables are multiplied."""
    users = [node for node, _ in value.uses()]
    return all(node.op_type == "Add" or (node.op_type == "Identity" and _is_added(node.outputs[0])) for node in users)
