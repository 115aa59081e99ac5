"""Merged decoders: a branch that uses the cache and one that does not, chosen by a boolean input."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from kvsurgeon.cache.pairs import find_cache_pairs, has_features
from kvsurgeon.errors import Code, UnsupportedError
from kvsurgeon.graph.branches import inline_branch
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
        UnsupportedError: Both branches read cache inputs.
    """
    if not any(True for _ in _chosen_by_input(model.graph)):
        return model
    copy = copy_model(model)
    editor, graph = Editor(copy), copy.graph
    pasts: list[set[ir.Value]] = []  # of each branch
    conditions: dict[ir.Value, None] = {}
    for node, condition in list(_chosen_by_input(graph)):
        branch, only = _cache_branch(node)
        if branch is None:
            return model
        inline_branch(editor, node, branch)
        pasts.append(only)
        conditions[condition] = None
    editor.before = None
    editor.finish()
    for condition in conditions:
        if all(user.graph is None for user, _ in condition.uses()):  # removed as dead code
            graph.inputs.remove(condition)
    cached = {pair.past for pair in find_cache_pairs(graph)}
    return copy if all(only & cached for only in pasts) else model


def _chosen_by_input(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield each `If` whose condition is a boolean input, with that input."""
    for node in graph:
        value = node.inputs[0] if is_operator(node, "If") else None
        if value is None:
            continue
        condition = through(value, lambda one: has_trait(one, Trait.IDENTITY, Trait.RESHAPE))
        if is_fed(condition) and condition.dtype is ir.DataType.BOOL:
            yield node, condition


def _cache_branch(node: ir.Node) -> tuple[ir.Graph | None, set[ir.Value]]:
    """Return the branch that reads tensors of the caller which the other does not, and these; None if neither does."""
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    fed = {value for value in all_inputs(node) if is_fed(value) and len(value.shape or ()) > 2 and has_features(value)}
    read = [{value for inside in branch for value in all_inputs(inside)} & fed for branch in branches]
    only = [read[0] - read[1], read[1] - read[0]]
    if not all(only):
        return next(((branch, own) for branch, own in zip(branches, only, strict=True) if own), (None, set()))
    if any(all(is_operator(inside, "Identity") for inside in branch) for branch in branches):
        return None, set()  # the other branch computes what this one is given: cross-attention, which is no cache
    raise UnsupportedError(
        "an input chooses between two branches, and which of them uses the cache is unknown",
        code=Code.CONTROL_FLOW, at=node.outputs[0].name, expected="one branch that reads cache inputs",
        found=" and ".join(f"`{min(value.name or '' for value in own)}`" for own in only),
    )  # fmt: skip
