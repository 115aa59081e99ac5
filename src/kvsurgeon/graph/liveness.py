"""What a graph's outputs depend on."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.graph.operators import SHAPE_ONLY


def read_by(node: ir.Node) -> list[ir.Value]:
    """Return the values that a node reads, those that its subgraphs capture included."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            made = {value for inside in inner.all_nodes() for value in inside.outputs} | set(inner.inputs)
            reads = [value for inside in inner.all_nodes() for value in inside.inputs if value is not None]
            values += [value for value in (*reads, *inner.outputs) if value not in made]
    return values


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
        pending += read_by(node)
    return alive


def follows_input(value: ir.Value) -> bool:
    """Whether what is in a value, and not only its shape, comes from an input that a caller must feed."""
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        source = pending.pop()
        if source in seen:
            continue
        seen.add(source)
        node = source.producer()
        if node is None and source.is_graph_input() and not source.is_initializer():
            return True
        pending += [] if node is None or node.op_type in SHAPE_ONLY else read_by(node)
    return False
