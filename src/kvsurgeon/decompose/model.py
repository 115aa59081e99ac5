"""Decompose the fused operators of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pkgutil import resolve_name

import onnx_ir as ir

from kvsurgeon.dataflow.input_dimensions import read_inputs
from kvsurgeon.decompose.fused_node import FusedNode, KeyCount
from kvsurgeon.decompose.onnx_attention import needs_decomposition
from kvsurgeon.decompose.relative_positions import gather_relative_positions
from kvsurgeon.decompose.simplify import simplify_model
from kvsurgeon.errors import PluginError
from kvsurgeon.graph.copies import copy_model
from kvsurgeon.graph.editor import Editor
from kvsurgeon.graph.query import STANDARD_DOMAINS, find_live, is_operator
from kvsurgeon.ops.table import operator_of

Rule = Callable[[FusedNode], None]


@dataclass(frozen=True, kw_only=True)
class DecomposedModel:
    """A model in standard operators.

    Attributes:
        model: The model; the original itself if it has nothing to decompose.
        assumed: Assumptions of the decomposition, each with the first value that needs it.
        key_counts: Numbers of keys that fused operators are given, as values of the model or of one like it.
        longest: The longest text in tokens for which it computes the same, as far as that was measured; None for all.
    """

    model: ir.Model
    assumed: Mapping[str, str] = field(default_factory=dict)
    key_counts: Sequence[KeyCount] = ()
    longest: int | None = None

    def limited_to(self, length: int) -> DecomposedModel:
        """Return the model with a length in tokens beyond which nothing is known of it."""
        return replace(self, longest=length if self.longest is None else min(self.longest, length))


def decompose(model: ir.Model) -> DecomposedModel:
    """Return a model in standard operators, without local functions and sequences; the original is not changed.

    Raises:
        UnsupportedError: A fused operator has unsupported inputs or attributes, such as a past.
        PluginError: The decomposition of an operator cannot be loaded.
    """
    simple = simplify_model(model)
    if not any(_rule(node) for node in simple.graph):
        return DecomposedModel(model=gather_relative_positions(simple))
    copy = copy_model(simple)
    assumed, key_counts = _decompose_nodes(copy)
    return DecomposedModel(model=gather_relative_positions(copy), assumed=assumed, key_counts=key_counts)


def decompose_attention(model: ir.Model) -> None:
    """Write each `Attention`, which the analysis reads as it is otherwise, in standard operators, in place.

    Raises:
        UnsupportedError: Its scores or weights are used.
    """
    _decompose_nodes(model, keep_attention=False)


def _decompose_nodes(model: ir.Model, *, keep_attention: bool = True) -> tuple[dict[str, str], list[KeyCount]]:
    """Decompose the nodes in place, and return the assumptions, and numbers of keys that are not read."""
    graph = model.graph
    live, shapes = find_live(graph), read_inputs(graph).shapes
    assumed: dict[str, str] = {}
    key_counts: list[KeyCount] = []
    editor = Editor(model)
    for node in list(graph):
        rule = _rule(node, keep_attention=keep_attention)
        if rule is not None and node in live:
            op = FusedNode(editor, node, shapes)
            rule(op)
            key_counts += op.key_counts
            for assumption in sorted(op.assumed):
                assumed.setdefault(assumption, op.name)
    return assumed, key_counts


def _rule(node: ir.Node, *, keep_attention: bool = True) -> Rule | None:
    """Return the function that decomposes a node; None if the node stays."""
    operator = operator_of(node)
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    if operator is None or operator.decomposition is None or operator.domain != domain:
        return None
    if keep_attention and is_operator(node, "Attention") and not needs_decomposition(node):
        return None
    return _load(operator.decomposition)


@cache
def _load(decomposition: str) -> Rule:
    try:
        rule: Rule = resolve_name(decomposition)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(f"decomposition {decomposition}: {type(error).__name__}: {error}") from error
    return rule
