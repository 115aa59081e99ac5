from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir

from kvsurgeon.passes.contract import Changed, Outcome, Subject


def raises(model: ir.Model) -> None:
    """Raise an error."""
    raise ZeroDivisionError(f"no {len(model.graph)} nodes\nfit here")


class Breaks:
    """Remove the node that computes the first output."""

    name: ClassVar[str] = "breaks"

    def apply(self, subject: Subject) -> Outcome:
        graph = subject.model.graph
        node = graph.outputs[0].producer()
        graph.remove(node)
        return Changed(edits=1)


class SaysNothing:
    """Return neither Changed nor Unchanged."""

    name: ClassVar[str] = "says-nothing"

    def apply(self, subject: Subject) -> None:
        return None


def differs(graph: gs.Graph) -> None:
    """Double the last product."""
    node = [node for node in graph.nodes if node.op == "MatMul"][-1]
    doubled = gs.Variable("doubled", dtype=np.float32)
    consumers = list(node.outputs[0].outputs)
    output = node.outputs[0]
    if consumers:
        for consumer in consumers:
            consumer.inputs = [doubled if tensor is output else tensor for tensor in consumer.inputs]
    else:
        doubled.name, output.name = output.name, "before_doubling"
        doubled.shape, output.shape = output.shape, None
        graph.outputs = [doubled if tensor is output else tensor for tensor in graph.outputs]
    two = gs.Constant("two", np.array(2, np.float32))
    graph.nodes.append(gs.Node("Mul", "double", inputs=[output, two], outputs=[doubled]))


def idle(graph: gs.Graph) -> gs.Graph:
    """Change nothing."""
    return graph


def unannotated(graph):
    """Have no annotation."""
