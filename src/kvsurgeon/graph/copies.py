"""Copies of models, and models made of two."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def copy_model(model: ir.Model) -> ir.Model:
    """Return a copy of a model that shares its weights and has its `meta`, which `ir.Model.clone` leaves out."""
    copy = model.clone()
    copy.meta.update(model.meta)
    return copy


def move_nodes(
    source: ir.Graph, graph: ir.Graph, given: Mapping[str, ir.Value], *, prefix: str, branch: ir.Graph | None = None
) -> list[ir.Value]:
    """Move the nodes and weights of one graph into another, and return the values that were its outputs.

    Weights that both have, as copies of one model do, are there once.

    Args:
        source: The graph, which is empty afterwards.
        graph: Takes its weights, and its inputs that are not given.
        given: Values of `graph` in place of inputs, by name.
        prefix: Prefix of the names of nodes, values and weights, which makes them unique.
        branch: A subgraph of `graph` that takes the nodes; None for `graph` itself.
    """
    outputs = list(source.outputs)
    source.outputs.clear()
    for value in list(source.inputs):
        source.inputs.remove(value)
        if value.name in given:
            value.replace_all_uses_with(given[value.name or ""])
        else:
            graph.inputs.append(value)
    there = {id(value.const_value): value for value in graph.initializers.values()}
    for value in list(source.initializers.values()):
        del source.initializers[value.name or ""]
        if id(value.const_value) in there:
            value.replace_all_uses_with(there[id(value.const_value)])
            continue
        value.name = f"{prefix}{value.name}"
        graph.initializers[value.name] = value
    nodes = list(source)
    source.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}{node.name}" if node.name else node.name
        for value in node.outputs:
            value.name = f"{prefix}{value.name}"
    (graph if branch is None else branch).extend(nodes)
    return outputs
