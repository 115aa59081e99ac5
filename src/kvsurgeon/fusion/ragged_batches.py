"""Ragged batches: sequences whose past lengths differ, of which only the attention operators read anything."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from kvsurgeon.fusion.operators import GROUP_QUERY_ATTENTION
from kvsurgeon.graph.query import all_inputs, is_fed, upstream

_OF_EACH_SEQUENCE = frozenset(range(3, 7))  # inputs of GroupQueryAttention: past key and value, lengths of sequences


def length_of_all_sequences(graph: ir.Graph, known: Collection[ir.Value]) -> ir.Value | None:
    """Return an input that gives one past length for the whole batch, or masks; None if there is none.

    Then each sequence of a batch is computed as if it were alone, however many tokens it has.

    Args:
        graph: A graph with a cache.
        known: Inputs that each sequence has for itself: new tokens, and what is the same in every call.
    """
    presents = {value for node in graph if GROUP_QUERY_ATTENTION.is_at(node) for value in node.outputs[1:]}
    results = [value for value in graph.outputs if value not in presents]
    read = upstream(results, inputs=_read)
    return next((value for value in read if is_fed(value) and value not in known), None)


def _read(node: ir.Node) -> list[ir.Value]:
    if not GROUP_QUERY_ATTENTION.is_at(node):
        return all_inputs(node)
    return [value for index, value in enumerate(node.inputs) if value is not None and index not in _OF_EACH_SEQUENCE]
