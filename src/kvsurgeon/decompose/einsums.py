"""Split `Einsum` into products of two tensors with an explicit result, and `Transpose` if there is one tensor."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor


def is_splittable(node: ir.Node) -> bool:
    """Return whether a node is an `Einsum` without ellipsis that is not a product of two tensors already."""
    if node.op_type != "Einsum" or "." in _equation(node):
        return False
    terms, result = _parse(_equation(node))
    if len(terms) == 1:
        return sorted(terms[0]) == sorted(result) == sorted(set(result))
    return len(terms) > 2 or "->" not in _equation(node)


def split_einsums(editor: Editor) -> None:
    """Multiply the tensors of each `Einsum` one by one: ab,bc,cd->ad becomes ab,bc->ac and ac,cd->ad."""
    for node in [node for node in editor.graph if is_splittable(node)]:
        editor.before = node
        if len(node.inputs) == 1:
            _transpose(editor, node)
        else:
            _multiply(editor, node)


def _transpose(editor: Editor, node: ir.Node) -> None:
    (term,), result = _parse(_equation(node))
    output, order = node.outputs[0], [term.index(label) for label in result]
    transpose = ir.Node(
        "", "Transpose", node.inputs, [ir.AttrInt64s("perm", order)], name=node.name,
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    editor.insert(transpose)
    transpose.outputs[0].type, transpose.outputs[0].shape = output.type, output.shape
    editor.replace(output, transpose.outputs[0])
    editor.graph.remove(node, safe=True)


def _multiply(editor: Editor, node: ir.Node) -> None:
    terms, result = _parse(_equation(node))
    left, value = terms[0], node.inputs[0]
    for index in range(1, len(terms) - 1):
        needed = set("".join(terms[index + 1 :]) + result)
        kept = "".join(label for label in dict.fromkeys(left + terms[index]) if label in needed)
        equation = ir.AttrString("equation", f"{left},{terms[index]}->{kept}")
        metadata = dict(node.metadata_props)
        product = ir.Node("", "Einsum", [value, node.inputs[index]], [equation], metadata_props=metadata)
        left, value = kept, editor.insert(product).outputs[0]
    last = len(terms) - 1
    node.replace_input_with(0, value)
    node.replace_input_with(1, node.inputs[last])
    node.resize_inputs(2)
    node.attributes["equation"] = ir.AttrString("equation", f"{left},{terms[last]}->{result}")


def _equation(node: ir.Node) -> str:
    return str(node.attributes["equation"].as_string()).replace(" ", "")


def _parse(equation: str) -> tuple[list[str], str]:
    """Return the labels of each tensor and of the result: by default those that occur once, in alphabetic order."""
    operands, _, result = equation.partition("->")
    if "->" not in equation:
        letters = operands.replace(",", "")
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    return operands.split(","), result
