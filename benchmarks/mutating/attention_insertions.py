"""Mutations that add to attention and to context: masks that see too much, weights without one, switches by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from mutating.mutable_graph import Graph

# Attention


def unmask_one_head(graph: Graph) -> str | None:
    """The first head, and only that, sees what the mask hides."""
    found = graph.pick(_masked(graph))
    if found is None:
        return None
    softmax, mask, scores = found
    heads = graph.before(softmax, "Shape", [scores])
    number = graph.before(softmax, "Gather", [heads, graph.constant(1)], axis=0)
    places = graph.before(softmax, "Range", [graph.constant(0), number, graph.constant(1)])
    column = graph.before(softmax, "Reshape", [places, graph.constant([1, -1, 1, 1])])
    first = graph.before(softmax, "Equal", [column, graph.constant(0)])
    softmax.input[0] = graph.before(softmax, "Where", [first, scores, mask.output[0]])
    return f"the first head of Softmax `{softmax.output[0]}` has no mask"


def second_weights(graph: Graph) -> str | None:
    """Values are summed a second time, by weights without a mask."""
    found = graph.pick(_masked(graph))
    if found is None:
        return None
    softmax, _, scores = found
    product = graph.pick([node for node in graph.readers(softmax.output[0]) if node.op_type == "MatMul"])
    if product is None:
        return None
    weights = graph.before(product, "Softmax", [scores], axis=-1)
    second = graph.before(product, "MatMul", [weights, product.input[1]])
    _behind(graph, product, lambda reader: graph.before(reader, "Add", [product.output[0], second]))
    return f"a second MatMul in addition to `{product.output[0]}`, by weights without a mask"


def scores_summary(graph: Graph) -> str | None:
    """Scale the output of an attention by a summary of its scores over all keys."""
    found = graph.pick(_masked(graph))
    if found is None:
        return None
    softmax, mask, scores = found
    product = graph.pick([node for node in graph.readers(softmax.output[0]) if node.op_type == "MatMul"])
    if product is None:
        return None
    operator = graph.pick(["ReduceMax", "ReduceMean", "ReduceMin"])
    source = graph.pick([scores, mask.output[0]])
    gate = graph.before(product, "Sigmoid", [graph.reduced(product, operator, source, -1)])
    _behind(graph, product, lambda reader: graph.before(reader, "Mul", [product.output[0], gate]))
    return f"`{product.output[0]}` is scaled by {operator} of `{source}` over keys"


def _masked(graph: Graph) -> list[tuple[NodeProto, NodeProto, str]]:
    """Each softmax with the node that masks its scores, and the scores before."""
    makers = graph.makers()
    found = []
    for softmax in graph.nodes_of("Softmax"):
        mask = makers.get(softmax.input[0])
        if mask is None or graph.rank_of(softmax.input[0]) != 4:
            continue
        if mask.op_type == "Add":
            scores = next((value for value in mask.input if _is_scores(makers, value)), None)
        elif mask.op_type == "Where":
            scores = next((value for value in mask.input[1:] if _is_scores(makers, value)), None)
        else:
            continue
        if scores is not None:
            found.append((softmax, mask, scores))
    return found


def _is_scores(makers: dict[str, NodeProto], value: str) -> bool:
    for _ in range(4):
        node = makers.get(value)
        if node is None or node.op_type in ("MatMul", "Einsum") or not node.input:
            return node is not None and len(node.input) > 0
        value = node.input[0]
    return False


def _behind(graph: Graph, node: NodeProto, make: Callable[[NodeProto], str]) -> None:
    """Rewire the consumers of a node to a value computed from its output."""
    value = node.output[0]
    readers = graph.readers(value)
    if not readers:
        return
    made = make(readers[0])
    for reader in readers:
        for index, read in enumerate(reader.input):
            if read == value:
                reader.input[index] = made


# Context that follows the length


def switch_by_length(graph: Graph) -> str | None:
    """A number is twice itself where there are more than so many tokens, or just as many."""
    edge = graph.pick(graph.edges(lambda dtype, rank: dtype == TensorProto.FLOAT and rank >= 2))
    if edge is None:
        return None
    limit, operator = graph.pick([1, 2, 3, 9, 15, 16, 20]), graph.pick(["Greater", "Equal", "Less", "Floor"])
    length = graph.length(edge.node)
    if operator == "Floor":
        real = graph.before(edge.node, "Cast", [length], to=TensorProto.FLOAT)
        share = graph.before(edge.node, "Mul", [real, graph.constant([1 / limit], np.float32)])
        factor = graph.before(edge.node, "Floor", [share])
    else:
        switch = graph.before(edge.node, operator, [length, graph.constant([limit])])
        twice, once = (graph.constant([number], np.float32) for number in (2.0, 1.0))
        factor = graph.before(edge.node, "Where", [switch, twice, once])
    what = f"{edge}, `{edge.value}`: scaled by the length ({operator} {limit})"
    graph.rewire(edge, graph.before(edge.node, "Mul", [edge.value, factor]))
    return what


def late_positions(graph: Graph) -> str | None:
    """Tokens from some place on are scaled by the length, those before are not."""
    edge = graph.pick(graph.edges(lambda dtype, rank: dtype == TensorProto.FLOAT and rank == 3))
    if edge is None:
        return None
    first = graph.pick([2, 5, 8, 12])
    length = graph.length(edge.node)
    scalar = graph.before(edge.node, "Squeeze", [length, graph.constant([0])] if graph.opset >= 13 else [length])
    places = graph.before(edge.node, "Range", [graph.constant(0), scalar, graph.constant(1)])
    late = graph.before(edge.node, "Less", [graph.constant([first]), places])
    real = graph.before(edge.node, "Cast", [length], to=TensorProto.FLOAT)
    small = graph.before(edge.node, "Mul", [real, graph.constant([0.1], np.float32)])
    factor = graph.before(edge.node, "Where", [late, small, graph.constant([1.0], np.float32)])
    column = graph.before(edge.node, "Reshape", [factor, graph.constant([1, -1, 1])])
    what = f"{edge}, `{edge.value}`: tokens behind {first} scaled by the length"
    graph.rewire(edge, graph.before(edge.node, "Mul", [edge.value, column]))
    return what


def replace_mask(graph: Graph) -> str | None:
    """The padding mask is not read: ones of its shape are, or the ids' signs."""
    masks = [value for value in graph.model.graph.input if "mask" in value.name]
    mask = graph.pick(masks)
    readers = graph.readers(mask.name) if mask is not None else []
    if not readers:
        return None
    ids = graph.model.graph.input[0].name
    source = graph.pick([mask.name, ids])
    if source == mask.name:
        zero = graph.before(readers[0], "Sub", [mask.name, mask.name])
        made = graph.before(readers[0], "Add", [zero, graph.constant_like(mask.name, 1)])
    else:
        made = graph.before(readers[0], "Sign", [ids])
    for reader in readers:
        for index, read in enumerate(reader.input):
            if read == mask.name:
                reader.input[index] = made
    return f"`{mask.name}` is made of `{source}`"


def every() -> Iterator[tuple[str, Callable[[Graph], str | None], int]]:
    """Insertions by name, each with how often it is drawn."""
    for insertion, weight in (
        (unmask_one_head, 2), (second_weights, 2), (scores_summary, 3), (switch_by_length, 5), (late_positions, 3),
        (replace_mask, 2),
    ):  # fmt: skip
        yield insertion.__name__, insertion, weight
