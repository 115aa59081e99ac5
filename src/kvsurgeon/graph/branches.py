"""Branches of `If`."""

from __future__ import annotations

import onnx_ir as ir

from kvsurgeon.graph.editor import Editor


def inline_branch(editor: Editor, node: ir.Node, branch: ir.Graph) -> None:
    """Replace an `If` by the nodes of a branch."""
    editor.before = node
    for value in list(branch.initializers.values()):
        branch.initializers.pop(value.name or "")
        value.name = editor.unique_name(value.name or "constant")
        editor.graph.register_initializer(value)
    inner, results = list(branch), list(branch.outputs)
    branch.outputs.clear()
    branch.remove(inner)
    for one in inner:
        one.name = editor.unique_name(one.name or one.op_type)
        for value in one.outputs:
            if value.name:
                value.name = editor.unique_name(value.name)
        editor.insert(one)
    for old, new in zip(node.outputs, results, strict=True):
        if old.is_graph_output():
            output = editor.replace_output(old, new)
            output.type, output.shape = old.type, old.shape
        old.replace_all_uses_with(new)
    editor.graph.remove(node, safe=True)
