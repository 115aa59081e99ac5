"""Sequences of tensors, taken apart: what is put in at one place and taken out at another needs no sequence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kvsurgeon.graph.constants import small_constant

MAKERS = frozenset({"SplitToSequence", "SequenceConstruct"})


def take_sequences_apart(graph: ir.Graph) -> None:
    """Write sequences out as `Split`, `Slice`, `Gather` and `Concat`, where their parts are taken by constant numbers.

    A sequence that is used in any other way stays as it is.
    """
    for node in list(graph):
        if node.op_type == "SplitToSequence":
            _take_parts_of_split(graph, node)
        elif node.op_type == "SequenceConstruct":
            _take_parts_of_construct(graph, node)


def _places(node: ir.Node) -> dict[ir.Node, int] | None:
    """The readers of a sequence and the places that they take; None where one of them does something else."""
    found: dict[ir.Node, int] = {}
    for user, _ in node.outputs[0].uses():
        place = small_constant(user.inputs[1]) if user.op_type == "SequenceAt" else None
        if place is None:
            return None
        found[user] = int(place)
    return None if node.outputs[0].is_graph_output() else found


def _take_parts_of_split(graph: ir.Graph, node: ir.Node) -> None:
    places = _places(node)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    sizes = small_constant(given)
    if places is None or (given is not None and sizes is None):
        return
    if sizes is not None and sizes.ndim == 1:
        _replace(graph, node, _split(graph, node, len(sizes)), places)
    elif min(places.values(), default=0) >= 0:
        size = 1 if sizes is None else int(sizes)
        squeezed = sizes is None and not node.attributes.get_int("keepdims", 1)
        parts = {place: _part(graph, node, place, size, squeezed=squeezed) for place in sorted(set(places.values()))}
        _replace(graph, node, parts, places)


def _split(graph: ir.Graph, node: ir.Node, count: int) -> dict[int, ir.Value]:
    """Parts of the sizes that are given; the last has the number -1 too."""
    parts = ir.Node(
        "", "Split", node.inputs[:2], [_axis(node)], num_outputs=count, name=node.name,
        metadata_props=dict(node.metadata_props),
    )  # fmt: skip
    for number, value in enumerate(parts.outputs):
        value.name = f"{node.outputs[0].name}.{number}"
    graph.insert_before(node, parts)
    return {place: parts.outputs[place] for place in range(-count, count)}


def _part(graph: ir.Graph, node: ir.Node, place: int, size: int, *, squeezed: bool) -> ir.Value:
    """One of many parts of one size; the last may be smaller. `squeezed` ones lose their axis."""
    name = f"{node.outputs[0].name}.{place}"
    if squeezed:
        index = _constant(graph, np.array(place), f"{name}.place")
        taken = ir.Node("", "Gather", [node.inputs[0], index], [_axis(node)], name=name)
    else:
        bounds = [place * size, (place + 1) * size, _axis(node).as_int()]
        inputs = [_constant(graph, np.array([bound]), f"{name}.bound_{index}") for index, bound in enumerate(bounds)]
        taken = ir.Node("", "Slice", [node.inputs[0], *inputs], name=name)
    taken.outputs[0].name = name
    graph.insert_before(node, taken)
    return taken.outputs[0]


def _constant(graph: ir.Graph, numbers: np.ndarray, name: str) -> ir.Value:
    tensor = ir.Tensor(numbers.astype(np.int64), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(numbers.shape), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _take_parts_of_construct(graph: ir.Graph, node: ir.Node) -> None:
    parts = [value for value in node.inputs if value is not None]
    joins = [user for user, _ in node.outputs[0].uses() if user.op_type == "ConcatFromSequence"]
    if joins and len(joins) == len(node.outputs[0].uses()) and not node.outputs[0].is_graph_output():
        if not any(join.attributes.get_int("new_axis", 0) for join in joins):
            for join in joins:
                joined = ir.Node("", "Concat", parts, [_axis(join)], name=join.name)
                joined.outputs[0].name = f"{join.outputs[0].name}.joined"
                graph.insert_before(join, joined)
                _hand_over(graph, join, joined.outputs[0])
            graph.remove(node, safe=True)
        return
    if (places := _places(node)) is not None:
        _replace(graph, node, {place: parts[place] for place in range(-len(parts), len(parts))}, places)


def _replace(graph: ir.Graph, node: ir.Node, parts: dict[int, ir.Value], places: dict[ir.Node, int]) -> None:
    if any(place not in parts for place in places.values()):
        return
    for user, place in places.items():
        _hand_over(graph, user, parts[place])
    graph.remove(node, safe=True)


def _hand_over(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let the readers of a node read a value, and drop the node; an output of the graph keeps its name."""
    old = node.outputs[0]
    if old.is_graph_output():
        same = ir.Node("", "Identity", [value])
        graph.insert_before(node, same)
        value = same.outputs[0]
        value.type, value.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    if value.is_graph_output():
        name, old.name = old.name, None
        value.name = name
    graph.remove(node, safe=True)


def _axis(node: ir.Node) -> ir.Attr:
    return ir.AttrInt64("axis", node.attributes.get_int("axis", 0))
