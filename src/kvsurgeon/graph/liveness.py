"""What a graph's outputs depend on."""

from __future__ import annotations

import onnx_ir as ir


def find_alive(graph: ir.Graph) -> set[ir.Node | ir.Value]:
    """Nodes and initializers that the graph's outputs depend on, subgraphs included."""
    alive: set[ir.Node | ir.Value] = set()
    pending: list[ir.Value] = [value for value in graph.outputs if value is not None]
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            alive.add(value)
            continue
        if node in alive:
            continue
        alive.add(node)
        pending += [value for value in node.inputs if value is not None]
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                for inner in attribute.as_graph().all_nodes():
                    alive.add(inner)
                    pending += [value for value in inner.inputs if value is not None]
    return alive
