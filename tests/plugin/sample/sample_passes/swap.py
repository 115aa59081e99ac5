import onnx_graphsurgeon as gs


def swap_addends(graph: gs.Graph, limit: int = 1000) -> None:
    """Swap the inputs of each Add."""
    for node in [node for node in graph.nodes if node.op == "Add"][:limit]:
        node.inputs = list(reversed(node.inputs))
