"""Einstein sums as sums of two tensors whose result is said; those of one that only move axes as `Transpose`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def can_be_plainer(node: ir.Node) -> bool:
    """Whether a node is an Einstein sum with every axis named that is not one of two tensors already."""
    if node.op_type != "Einsum" or "." in _equation(node):
        return False
    terms, result = _read(_equation(node))
    if len(terms) == 1:
        return sorted(terms[0]) == sorted(result) == sorted(set(result))
    return len(terms) > 2 or "->" not in _equation(node)


def multiply_in_pairs(graph: ir.Graph) -> None:
    """Multiply the tensors of every such sum one after the other: ab,bc,cd->ad is ab,bc->ac and ac,cd->ad."""
    for node in list(graph):
        if can_be_plainer(node) and len(node.inputs) == 1:
            _transpose(graph, node)
        elif can_be_plainer(node):
            _multiply(graph, node)


def _transpose(graph: ir.Graph, node: ir.Node) -> None:
    (term,), result = _read(_equation(node))
    order = ir.AttrInt64s("perm", [term.index(label) for label in result])
    moved = ir.Node("", "Transpose", node.inputs, [order], name=node.name, metadata_props=dict(node.metadata_props))
    graph.insert_before(node, moved)
    name, moved.outputs[0].type, moved.outputs[0].shape = (
        node.outputs[0].name,
        node.outputs[0].type,
        node.outputs[0].shape,
    )
    ir.convenience.replace_all_uses_with(node.outputs[0], moved.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
    moved.outputs[0].name = name


def _equation(node: ir.Node) -> str:
    return str(node.attributes["equation"].as_string()).replace(" ", "")


def _multiply(graph: ir.Graph, node: ir.Node) -> None:
    terms, result = _read(_equation(node))
    left, value = terms[0], node.inputs[0]
    for index in range(1, len(terms) - 1):
        needed = set("".join(terms[index + 1 :]) + result)
        kept = "".join(label for label in dict.fromkeys(left + terms[index]) if label in needed)
        product = _product(graph, node, (value, node.inputs[index]), f"{left},{terms[index]}->{kept}")
        left, value = kept, product
    last = len(terms) - 1
    node.replace_input_with(0, value)
    node.replace_input_with(1, node.inputs[last])
    node.resize_inputs(2)
    node.attributes["equation"] = ir.AttrString("equation", f"{left},{terms[last]}->{result}")


def _read(equation: str) -> tuple[list[str], str]:
    """The labels of each tensor, and of the result: where it is not said, those that stand once, in their order."""
    operands, _, result = equation.partition("->")
    if "->" not in equation:
        letters = operands.replace(",", "")
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    return operands.split(","), result


def _product(graph: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], equation: str) -> ir.Value:
    pair = ir.Node(
        "", "Einsum", inputs, [ir.AttrString("equation", equation)], metadata_props=dict(node.metadata_props)
    )
    graph.insert_before(node, pair)
    return pair.outputs[0]
