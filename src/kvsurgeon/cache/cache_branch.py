"""Merged decoders: a branch that uses the cache and one that does not, chosen by a boolean input."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from kvsurgeon.cache.pairs import has_features
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import all_inputs, is_fed, is_operator, through
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait


def take_cache_branch(model: ir.Model) -> ir.Model:
    """Return a model whose outputs are those of the branch that uses the cache, without the input that chooses it.

    With an empty past that branch should compute what the other one does: verification compares with both.

    The original is not changed: the result is a copy, or the original itself if it has no such branches.

    Raises:
        UnsupportedError: Both branches read cache inputs, or neither does.
    """
    if not any(_chosen_by_input(model.graph)):
        return model
    copy = copy_model(model)
    editor, graph = Editor(copy), copy.graph
    for node, condition in list(_chosen_by_input(graph)):
        _inline(editor, node, _cache_branch(node))
        if condition in graph.inputs and not condition.uses():
            graph.inputs.remove(condition)
    editor.before = None
    editor.finish()
    for value in [value for value in graph.inputs if value.dtype is ir.DataType.BOOL and not value.uses()]:
        graph.inputs.remove(value)
    return copy


def _chosen_by_input(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield each `If` whose condition is a boolean input, with that input."""
    for node in graph:
        value = node.inputs[0] if is_operator(node, "If") else None
        if value is None:
            continue
        condition = through(value, lambda one: has_trait(one, Trait.IDENTITY, Trait.RESHAPE))
        if is_fed(condition) and condition.dtype is ir.DataType.BOOL:
            yield node, condition


def _cache_branch(node: ir.Node) -> ir.Graph:
    """Return the branch that reads inputs with a row for each past token."""
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    pasts = {
        value for value in all_inputs(node) if is_fed(value) and len(value.shape or ()) > 2 and has_features(value)
    }
    read = [{value for inside in branch for value in all_inputs(inside)} & pasts for branch in branches]
    for branch, own, other in zip(branches, read, reversed(read), strict=True):
        if own - other:
            if other - own:
                break
            return branch
    raise UnsupportedError(
        "an input chooses between two branches, and which of them uses the cache is unknown",
        code=Code.CONTROL_FLOW, at=node.outputs[0].name, expected="one branch that reads cache inputs",
        found=f"{len(read[0])} and {len(read[1])} cache inputs",
    )  # fmt: skip


def _inline(editor: Editor, node: ir.Node, branch: ir.Graph) -> None:
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
