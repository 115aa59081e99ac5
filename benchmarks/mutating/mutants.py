"""Mutations of decoders: small wrongs done to a graph, some of which no cache can survive.

Each takes a graph, changes it somewhere, and returns what it did; None where the graph has no place for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from mutating.mutable_graph import Edge, Graph, attribute_of

Mutation = Callable[[Graph], "str | None"]

SIBLINGS = (  # operators of one kind: each may replace another
    ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"),
    ("And", "Or", "Xor"),
    ("Add", "Sub", "Mul", "Max", "Min"),
    ("Sin", "Cos", "Neg", "Identity", "Abs", "Sigmoid", "Tanh", "Exp"),
    ("Softmax", "LogSoftmax", "Hardmax", "Sigmoid"),
    ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"),
)
PASSES_SHAPE = frozenset(
    ["Add", "Sub", "Mul", "Div", "Where", "And", "Or", "Neg", "Not", "Cast", "Softmax", "Clip", "Pow", "Sqrt", "Trilu"]
)


# Rewiring


def swap_inputs(graph: Graph) -> str | None:
    """Two inputs of one node change places: Where's branches, a difference, a product."""
    node = graph.pick([node for node in graph.nodes if len(set(node.input)) > 1 and node.op_type != "Reshape"])
    if node is None:
        return None
    left, right = graph.random.sample(range(len(node.input)), 2)
    node.input[left], node.input[right] = node.input[right], node.input[left]
    return f"inputs {left} and {right} of {node.op_type} `{node.output[0]}` swapped"


def swap_siblings(graph: Graph) -> str | None:
    """Two nodes of one operator, near each other, change an input: K and V, cos and sin, two masks."""
    nodes = graph.nodes
    first = graph.pick([place for place, node in enumerate(nodes) if node.op_type != "Constant" and node.input])
    if first is None:
        return None
    index = graph.random.randrange(len(nodes[first].input))
    near = [node for node in nodes[first + 1 : first + 60] if node.op_type == nodes[first].op_type]
    others = [n for n in near if index < len(n.input) and n.input[index] != nodes[first].input[index]]
    second = graph.pick(others)
    if second is None:
        return None
    one, other = Edge(node=nodes[first], index=index), Edge(node=second, index=index)
    what = f"{one} and {other} swapped"
    mine, theirs = one.value, other.value
    graph.rewire(other, mine)
    if graph.random.random() < 0.5 and theirs in _available(graph, nodes[first]):
        graph.rewire(one, theirs)
    return what


def reroute(graph: Graph) -> str | None:
    """An input is another value of the same type and rank."""
    edge = graph.pick(graph.edges(lambda dtype, rank: True))
    if edge is None:
        return None
    kind = (graph.type_of(edge.value), graph.rank_of(edge.value))
    others = [
        value
        for value in _available(graph, edge.node)
        if (graph.type_of(value), graph.rank_of(value)) == kind and value != edge.value
    ]
    value = graph.pick(others)
    if value is None:
        return None
    what = f"{edge} is `{value}`, no more `{edge.value}`"
    graph.rewire(edge, value)
    return what


def bypass(graph: Graph) -> str | None:
    """A node is left out: a mask is dropped, a sign, a cast, a scale."""
    node = graph.pick([node for node in graph.nodes if node.op_type in PASSES_SHAPE])
    if node is None:
        return None
    kind = graph.type_of(node.output[0])
    same_type = [value for value in node.input if value and graph.type_of(value) == kind]
    value = graph.pick(same_type)
    if value is None:
        return None
    for reader in graph.readers(node.output[0]):
        for index, read in enumerate(reader.input):
            if read == node.output[0]:
                reader.input[index] = value
    return f"{node.op_type} `{node.output[0]}` left out for its input `{value}`"


def _available(graph: Graph, node: NodeProto) -> list[str]:
    """Values that are there before a node runs."""
    found = [value.name for value in graph.model.graph.input]
    for other in graph.nodes:
        if other is node or other == node:
            break
        found += other.output
    return found


# Operators, attributes, constants


def change_operator(graph: Graph) -> str | None:
    """An operator is another of its kind: a comparison, a sign, an activation."""
    names = {name for kind in SIBLINGS for name in kind}
    node = graph.pick(graph.nodes_of(*names))
    if node is None:
        return None
    kind = graph.pick([kind for kind in SIBLINGS if node.op_type in kind])
    before = node.op_type
    node.op_type = graph.pick([name for name in kind if name != before])
    if node.op_type in ("Sigmoid", "Identity", "Neg", "Abs", "Exp", "Tanh"):
        del node.attribute[:]
    return f"{before} `{node.output[0]}` is {node.op_type}"


def change_axis(graph: Graph) -> str | None:
    """An axis is another."""
    node = graph.pick([node for node in graph.nodes if attribute_of(node, "axis") or attribute_of(node, "axes")])
    if node is None:
        return None
    axis = graph.random.randint(-4, 3)
    attribute = attribute_of(node, "axis") or attribute_of(node, "axes")
    assert attribute is not None
    before = helper.get_attribute_value(attribute)
    if attribute.name == "axis":
        attribute.i = axis
    else:
        attribute.ints[graph.random.randrange(len(attribute.ints))] = axis
    return f"{node.op_type} `{node.output[0]}`: {attribute.name} {before} has become {axis}"


def change_softmax(graph: Graph) -> str | None:
    """The softmax of an attention goes over another axis."""
    node = graph.pick(graph.nodes_of("Softmax"))
    if node is None:
        return None
    axis = graph.pick([0, 1, 2, -2])
    if attribute_of(node, "axis") is not None:
        node.attribute.remove(attribute_of(node, "axis"))
    node.attribute.append(helper.make_attribute("axis", axis))
    return f"Softmax `{node.output[0]}`: axis {axis}"


def change_order(graph: Graph) -> str | None:
    """Two axes of a `Transpose` change places."""
    nodes = [node for node in graph.nodes_of("Transpose") if len(_order(node)) > 1]
    node = graph.pick(nodes)
    if node is None:
        return None
    attribute = attribute_of(node, "perm")
    assert attribute is not None
    left, right = graph.random.sample(range(len(attribute.ints)), 2)
    order = list(attribute.ints)
    order[left], order[right] = order[right], order[left]
    attribute.ints[:] = order
    return f"Transpose `{node.output[0]}`: perm {order}"


def _order(node: NodeProto) -> list[int]:
    attribute = attribute_of(node, "perm")
    return [] if attribute is None else list(attribute.ints)


def flip_flag(graph: Graph) -> str | None:
    """An integer attribute is another: a triangle's side, causality, which axes are kept."""
    names = ("upper", "is_causal", "keepdims", "exclusive", "reverse", "interleaved", "transB", "transA", "allowzero")
    flagged = [(node, a) for node in graph.nodes for a in node.attribute if a.name in names]
    found = graph.pick(flagged)
    if found is None:
        return None
    node, attribute = found
    attribute.i = 1 - attribute.i
    return f"{node.op_type} `{node.output[0]}`: {attribute.name} {attribute.i}"


def change_integer(graph: Graph) -> str | None:
    """A bound, an index, a shape, an axis: one number of a small whole constant is another."""
    found = graph.pick(graph.constants(lambda array: array.dtype.kind == "i" and array.size > 0))
    if found is None:
        return None
    name, tensor = found
    array = numpy_helper.to_array(tensor).copy()
    place = graph.random.randrange(array.size)
    before = int(array.reshape(-1)[place])
    after = graph.pick([before + 1, before - 1, -before, 0, 1, -1, 2, before * 2, 2**62])
    try:
        array.reshape(-1)[place] = after
    except OverflowError:
        return None
    _store(tensor, array)
    return f"constant `{name}`[{place}]: {before} has become {after}"


def change_number(graph: Graph) -> str | None:
    """A scale, a threshold, a mask's depth: one number of a small constant is another."""
    found = graph.pick(graph.constants(lambda array: array.dtype.kind in "fb" and array.size > 0))
    if found is None:
        return None
    name, tensor = found
    array = numpy_helper.to_array(tensor).copy()
    place = graph.random.randrange(array.size)
    before = array.reshape(-1)[place]
    if array.dtype.kind == "b":
        after = not before
    else:
        after = graph.pick([-before, 0.0, 1.0, before * 2, before / 10, before + 1, -15.0, 0.5])
    array.reshape(-1)[place] = after
    _store(tensor, array)
    return f"constant `{name}`[{place}]: {before} has become {after}"


def _store(tensor: TensorProto, array: np.ndarray) -> None:
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def widen_dimension(graph: Graph) -> str | None:
    """A declared dimension of an input is another: a lie, or a name for two things."""
    values = [v for v in graph.model.graph.input if len(v.type.tensor_type.shape.dim)]
    value = graph.pick(values)
    if value is None:
        return None
    sizes = value.type.tensor_type.shape.dim
    place = graph.random.randrange(len(sizes))
    own = [size.dim_param or "x" for size in (sizes[0], sizes[-1])]
    word = graph.pick(["sequence", "batch", *own, "", "past_sequence_length"])
    sizes[place].Clear()
    if word:
        sizes[place].dim_param = word
    return f"input `{value.name}`: axis {place} is called `{word}`"


def rename(graph: Graph) -> str | None:
    """A value has a name that the surgery wants for itself."""
    node = graph.pick([node for node in graph.nodes if node.op_type != "Constant"])
    if node is None:
        return None
    name = graph.pick(["past_key_values.0.key", "present.0.value", "past_length", "total_length", "shape", "axes"])
    if any(name in other.output for other in graph.nodes):
        return None
    before = node.output[0]
    outputs = {value.name for value in graph.model.graph.output}
    if before in outputs:
        return None
    for reader in graph.readers(before):
        for index, read in enumerate(reader.input):
            if read == before:
                reader.input[index] = name
    node.output[0] = name
    return f"`{before}` is called `{name}`"


def damage(graph: Graph) -> str | None:
    """Bytes of the file are others, or it ends too early; it may not be readable any more."""
    data = bytearray(graph.model.SerializeToString())
    count = graph.random.choice([1, 2, 8])
    for _ in range(count):
        data[_place(graph, data)] = graph.random.randrange(256)
    what = f"{count} bytes damaged"
    if graph.random.random() < 0.2:
        del data[_place(graph, data) :]
        what += f", cut to {len(data)}"
    graph.damaged = bytes(data)
    return what


def _place(graph: Graph, data: bytearray) -> int:
    """Most bytes are weights: a third of the damage is done where the graph is, which comes first."""
    return graph.random.randrange(min(len(data), 20_000) if graph.random.random() < 0.33 else len(data))


def every() -> Iterator[tuple[str, Mutation, int]]:
    """Mutations by name, each with how often it is drawn."""
    for mutation, weight in (
        (swap_inputs, 3), (swap_siblings, 5), (reroute, 5), (bypass, 6), (change_operator, 6), (change_axis, 4),
        (change_softmax, 2), (change_order, 3), (flip_flag, 2), (change_integer, 10), (change_number, 5),
        (widen_dimension, 1), (rename, 1), (damage, 4),
    ):  # fmt: skip
        yield mutation.__name__, mutation, weight
