"""Mutations that add to a graph along an axis: sums, shifts, extrema, the first and the last given to all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from onnx import TensorProto

from mutating.mutable_graph import FLOATS, Edge, Graph

Insertion = Callable[[Graph, Edge, int], str]  # edge and axis -> the value to read in place of the edge's
END = 2**62


# Along an axis: what it is asked to do to one edge, in front of the node that reads it


def running_sum(graph: Graph, edge: Edge, axis: int) -> str:
    flags = {"reverse": graph.random.randint(0, 1), "exclusive": graph.random.randint(0, 1)}
    return graph.before(edge.node, "CumSum", [edge.value, graph.constant(axis)], **flags)


def _cut(graph: Graph, edge: Edge, axis: int, start: int, end: int, step: int = 1) -> str:
    numbers = [graph.constant([number]) for number in (start, end, axis, step)]
    return graph.before(edge.node, "Slice", [edge.value, *numbers])


def shifted(graph: Graph, edge: Edge, axis: int) -> str:
    """Everything one place on: the last goes first, or nothing does."""
    rest = _cut(graph, edge, axis, 0, -1)
    first = _cut(graph, edge, axis, -1, END)
    if graph.type_of(edge.value) in FLOATS and graph.random.random() < 0.7:
        first = graph.before(edge.node, "Mul", [first, graph.constant_like(edge.value, 0)])
    return graph.before(edge.node, "Concat", [first, rest], axis=axis)


def shifted_back(graph: Graph, edge: Edge, axis: int) -> str:
    rest, last = _cut(graph, edge, axis, 1, END), _cut(graph, edge, axis, 0, 1)
    return graph.before(edge.node, "Concat", [rest, last], axis=axis)


def reversed_(graph: Graph, edge: Edge, axis: int) -> str:
    return _cut(graph, edge, axis, -1, -END, -1)


def with_last(graph: Graph, edge: Edge, axis: int) -> str:
    return graph.before(edge.node, "Add", [edge.value, _cut(graph, edge, axis, -1, END)])


def with_last_gathered(graph: Graph, edge: Edge, axis: int) -> str:
    last = graph.before(edge.node, "Gather", [edge.value, graph.constant([-1])], axis=axis)
    return graph.before(edge.node, "Mul", [edge.value, last])


def with_first(graph: Graph, edge: Edge, axis: int) -> str:
    return graph.before(edge.node, "Add", [edge.value, _cut(graph, edge, axis, 0, 1)])


def with_reduced(graph: Graph, edge: Edge, axis: int) -> str:
    operator = graph.pick(["ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"])
    return graph.before(edge.node, "Sub", [edge.value, graph.reduced(edge.node, operator, edge.value, axis)])


def softened(graph: Graph, edge: Edge, axis: int) -> str:
    return graph.before(edge.node, graph.pick(["Softmax", "LogSoftmax", "Hardmax"]), [edge.value], axis=axis)


def normalized(graph: Graph, edge: Edge, axis: int) -> str:
    return graph.before(edge.node, "LpNormalization", [edge.value], axis=axis, p=2)


def reversed_order(graph: Graph, edge: Edge, axis: int) -> str:
    """Two neighboring axes change places."""
    order = list(range(graph.rank_of(edge.value) or 0))
    other = axis - 1 if axis else 1
    order[axis], order[other] = order[other], order[axis]
    return graph.before(edge.node, "Transpose", [edge.value], perm=order)


def filled_up(graph: Graph, edge: Edge, axis: int) -> str:
    """One more in front, one less behind."""
    rank = graph.rank_of(edge.value) or 0
    pads = [0] * (2 * rank)
    pads[axis] = 1
    padded = graph.before(edge.node, "Pad", [edge.value, graph.constant(pads)])
    numbers = [graph.constant([number]) for number in (0, -1, axis)]
    return graph.before(edge.node, "Slice", [padded, *numbers])


ALONG: tuple[Insertion, ...] = (
    running_sum, shifted, shifted_back, reversed_, with_last, with_last_gathered, with_first, with_reduced, softened,
    normalized, reversed_order, filled_up,
)  # fmt: skip


def along_axis(graph: Graph) -> str | None:
    """An operator along some axis of some tensor."""
    return _insert(graph, graph.edges(lambda dtype, rank: dtype == TensorProto.FLOAT and rank >= 2))


def along_axis_of_attention(graph: Graph) -> str | None:
    """An operator along some axis between queries, keys, scores, weights and values."""
    edges = graph.edges(lambda dtype, rank: dtype == TensorProto.FLOAT and rank >= 3)
    near = _near_softmax(graph)
    return _insert(graph, [edge for edge in edges if edge.node.output[0] in near])


def along_axis_of_context(graph: Graph) -> str | None:
    """An operator along some axis of a mask or of positions."""
    edges = graph.edges(lambda dtype, rank: dtype in (TensorProto.INT64, TensorProto.BOOL) and rank >= 2)
    moves = (shifted, shifted_back, reversed_, reversed_order)
    return _insert(graph, edges, moves)


def _insert(graph: Graph, edges: list[Edge], insertions: tuple[Insertion, ...] = ALONG) -> str | None:
    edge = graph.pick(edges)
    if edge is None:
        return None
    rank = graph.rank_of(edge.value) or 1
    axis = graph.random.randrange(0 if rank == 2 and insertions is ALONG else 1, rank)  # the first is the batch
    insertion = graph.pick(insertions)
    what = f"{edge}, `{edge.value}`: {insertion.__name__} along axis {axis}"
    graph.rewire(edge, insertion(graph, edge, axis))
    return what


def _near_softmax(graph: Graph) -> set[str]:
    """Outputs of nodes a few steps before and behind a softmax."""
    found = {node.output[0] for node in graph.nodes_of("Softmax")}
    makers = graph.makers()
    for _ in range(3):
        for value in list(found):
            found |= {reader.output[0] for reader in graph.readers(value)}
            found |= {read for read in makers[value].input if read in makers} if value in makers else set()
    return found


def every() -> Iterator[tuple[str, Callable[[Graph], str | None], int]]:
    """Insertions by name, each with how often it is drawn."""
    for insertion, weight in ((along_axis, 8), (along_axis_of_attention, 10), (along_axis_of_context, 5)):
        yield insertion.__name__, insertion, weight
