"""Cache inputs that a graph updates in no form that `pairs` knows. They are named, so that none is overlooked.

Elements of such an input move to an output, where others are appended or written between them. Rows may also be written
by arithmetic: the buffer times 0 where they go, plus the new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import onnx_ir as ir

from kvsurgeon.cache.layout import declared_shape
from kvsurgeon.cache.pairs import find_cache_pairs, has_features, is_view
from kvsurgeon.cache.states import find_recurrent_states
from kvsurgeon.dataflow.input_dimensions import declared_dimensions, required_inputs
from kvsurgeon.graph.query import is_operator, producers, upstream
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait


def find_unknown_caches(graph: ir.Graph) -> dict[ir.Value, str]:
    """Return the cache inputs that are updated in an unknown form, each with the operators that do so.

    Embeddings that are cached as they are given are such inputs too.
    """
    pairs = find_cache_pairs(graph)
    known = {pair.past for pair in pairs} | {state.past for state in find_recurrent_states(graph)}
    nodes = {pair.node for pair in pairs}
    found: dict[ir.Value, str] = {}
    for past in required_inputs(graph):
        if past in known or not has_features(past) or len(past.shape or ()) < 3:
            continue
        operators = _updated_by(past, nodes, _moves, _joins) or _written_by_arithmetic(graph, past, nodes)
        if operators is not None:
            found[past] = operators
    return found


def _updated_by(
    past: ir.Value, known: Collection[ir.Node], moves: Callable[[ir.Node, int], bool], joins: Callable[[ir.Node], bool]
) -> str | None:
    """Return the operators between an input and an output that holds its elements and others; None if there is none."""
    moved = list(_moved(past, known, moves))
    returned = next((value for value in moved if value.is_graph_output()), None)
    nodes = producers(moved)
    if returned is None or not any(len(node.inputs) > 1 and joins(node) for node in nodes):
        return None
    return f"{', '.join(dict.fromkeys(node.op_type for node in nodes))} to `{returned.name}`"


def _written_by_arithmetic(graph: ir.Graph, past: ir.Value, known: Collection[ir.Node]) -> str | None:
    """Return the operators that write rows of new tokens into a buffer by arithmetic; None if there are none."""
    dimensions, length = declared_dimensions(graph)
    tokens = {value for value, sizes in dimensions.items() if length in sizes}
    same = any(declared_shape(output) == declared_shape(past) for output in graph.outputs if output.shape is not None)
    if past in tokens or not same:
        return None

    def moves(node: ir.Node, index: int) -> bool:
        return _moves(node, index) or has_trait(node, Trait.ADD, Trait.SCALE)

    def joins(node: ir.Node) -> bool:
        return has_trait(node, Trait.ADD) and any(tokens & set(upstream([value])) for value in node.inputs)

    return _updated_by(past, known, moves, joins)


def _moved(past: ir.Value, known: Collection[ir.Node], moves: Callable[[ir.Node, int], bool]) -> Iterator[ir.Value]:
    """Yield the values that hold elements of an input before or between others, not through known updates."""
    pending, visited = [past], {past}
    while pending:
        value = pending.pop()
        yield value
        for node, index in value.uses():
            if node in known or not moves(node, index):
                continue
            fresh = [output for output in node.outputs if output not in visited]
            visited.update(fresh)
            pending += fresh


def _moves(node: ir.Node, index: int) -> bool:
    """Return whether the result of a node holds elements of its input of this index."""
    moves = is_view(node) or _joins(node) or has_trait(node, Trait.SELECT)
    return moves and (index == 0 or node.op_type == "Where")


def _joins(node: ir.Node) -> bool:
    """Return whether a node puts elements of several tensors into one."""
    return is_operator(node, "Concat") or is_operator(node, "Where") or has_trait(node, Trait.SCATTER)
