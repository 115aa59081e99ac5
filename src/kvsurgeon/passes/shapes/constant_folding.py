"""Constant folding, with the kernels of onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import constant_tensor, is_weight
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.execution import build_model, initializer, open_session
from kvsurgeon.graph.query import STANDARD_DOMAINS

LARGEST = 1 << 26  # bytes of a folded constant

_DOMAINS = (*STANDARD_DOMAINS, "com.microsoft")


def fold_shapes(model: ir.Model, editor: Editor, shapes: Shapes) -> None:
    """Replace integers that shape inference computed by constants."""
    for node in list(model.graph):
        for value in node.outputs:
            fact = shapes.facts.get(value)
            if fact is None or fact.value is None or fact.dtype is None or value.is_graph_output() or not value.uses():
                continue
            if constant_tensor(value) is None and _is_integral(fact.value, fact.dtype):
                _fold(editor, value, fact.value.astype(fact.dtype.numpy()))


def fold_constants(model: ir.Model, editor: Editor) -> None:
    """Replace values that are computed from small constants by constants; weights are not read."""
    nodes = _constant_nodes(model.graph)
    results = [value for node in nodes for value in node.outputs if any(user not in nodes for user, _ in value.uses())]
    results = [value for value in results if not value.is_graph_output()]
    if not results:
        return
    for value, array in zip(results, _execute(model, list(nodes), results), strict=False):
        if array.nbytes <= LARGEST:
            _fold(editor, value, array)


def replace_uses(editor: Editor, value: ir.Value, by: ir.Value) -> None:
    """Replace a value by another one as input of nodes, but not as graph output."""
    for node, index in list(value.uses()):
        editor.replace_input(node, index, by)


def _fold(editor: Editor, value: ir.Value, array: np.ndarray) -> None:
    replace_uses(editor, value, editor.constant(array, array.dtype, name=f"{value.name}.fixed"))


def _is_integral(numbers: np.ndarray, dtype: ir.DataType) -> bool:
    integral = not dtype.is_floating_point() and dtype is not ir.DataType.STRING
    return integral and all(isinstance(number, (int, bool)) for number in numbers.reshape(-1))


def _constant_nodes(graph: ir.Graph) -> dict[ir.Node, None]:
    """Return the nodes that depend on small constants alone, as an ordered set."""
    found: dict[ir.Node, None] = {}
    known: set[ir.Value] = set()
    graph.sort()
    for node in graph:
        if _is_foldable(node) and all(value is None or value in known or _is_small(value) for value in node.inputs):
            found[node] = None
            known.update(node.outputs)
    return found


def _is_foldable(node: ir.Node) -> bool:
    if node.domain not in _DOMAINS or node.op_type == "Constant" or node.op_type.startswith("Random"):
        return False
    return all(attribute.type is not ir.AttributeType.GRAPH for attribute in node.attributes.values())


def _is_small(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and not is_weight(tensor) and tensor.dtype is not ir.DataType.STRING


def _execute(model: ir.Model, nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> list[np.ndarray]:
    """Return the results of the nodes; none if onnxruntime lacks a kernel, as for bfloat16."""
    tensors = {value: constant_tensor(value) for node in nodes for value in node.inputs if value is not None}
    subgraph = build_model(
        nodes,
        outputs=[value.name for value in results],
        opsets=model.graph.opset_imports,
        initializers=[initializer(value.name, tensor) for value, tensor in tensors.items() if tensor is not None],
    )
    try:
        return [np.asarray(array) for array in open_session(subgraph).run(None, {})]
    except Exception:  # onnxruntime has no common base class
        return []
