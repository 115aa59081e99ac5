"""Walk a graph: what a value is computed from, what is computed from it, and what the outputs need.

Every walk is iterative, so depth does not matter, and yields each value once, nearest first. Two parameters shape a
walk: `stop` ends it at a value (or node), and `inputs` chooses the inputs through which it goes on. `all_inputs` goes
through everything; `ops.content.content_inputs` does not go through `Shape` and its kin, whose results hold no content
of their input.

    upstream([logits])                                            # everything that the logits depend on
    upstream([mask], inputs=content_inputs)                       # ... by content, not only by shape
    upstream([weights], stop=lambda value: value in scores)       # all between scores and weights
    producers(upstream([weights]))                                # the nodes of it
    through(value, {"Cast", "Identity"})                          # the value before any cast
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator

import onnx_ir as ir

STANDARD_DOMAINS = ("", "ai.onnx")

InputsOf = Callable[[ir.Node], Iterable[ir.Value | None]]


def is_operator(node: ir.Node | None, *operators: str) -> bool:
    """Return whether a node is one of these operators of the standard ONNX domain."""
    return node is not None and node.op_type in operators and node.domain in STANDARD_DOMAINS


def producer_of(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """Return the node that computes a value if it is one of these standard operators; None otherwise."""
    node = None if value is None else value.producer()
    return node if is_operator(node, *operators) else None


def all_inputs(node: ir.Node) -> list[ir.Value]:
    """Return the values that a node reads, including those that its subgraphs capture."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.data.values():  # the plain dict below is several times as fast to walk
        if attribute.type is ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            made = {value for inside in inner.all_nodes() for value in inside.outputs} | set(inner.inputs)
            reads = [value for inside in inner.all_nodes() for value in inside.inputs if value is not None]
            values += [value for value in (*reads, *inner.outputs) if value not in made]
    return values


def upstream(
    values: Iterable[ir.Value | None], *, stop: Callable[[ir.Value], bool] | None = None, inputs: InputsOf = all_inputs
) -> Iterator[ir.Value]:
    """Yield the values and everything they are computed from, each once, nearest first.

    Args:
        values: Where to start; None is skipped.
        stop: The walk yields a value for which this is true, but goes no further from it.
        inputs: Returns the inputs of a node through which the walk goes on.
    """
    pending = deque(dict.fromkeys(values))
    visited = set(pending)
    while pending:
        value = pending.popleft()
        if value is None:
            continue
        yield value
        node = value.producer()
        if node is None or (stop is not None and stop(value)):
            continue
        for source in inputs(node):
            if source is not None and source not in visited:
                visited.add(source)
                pending.append(source)


def downstream(values: Iterable[ir.Value], *, stop: Callable[[ir.Node], bool] | None = None) -> Iterator[ir.Value]:
    """Yield the values and everything computed from them, each once, nearest first.

    Subgraphs are not entered: a node that captures a value is not found.

    Args:
        values: Where to start.
        stop: The walk does not go through a node for which this is true: its outputs are not yielded.
    """
    pending = deque(dict.fromkeys(values))
    visited = set(pending)
    while pending:
        value = pending.popleft()
        yield value
        for node in dict.fromkeys(node for node, _ in value.uses()):
            if stop is not None and stop(node):
                continue
            fresh = [output for output in node.outputs if output not in visited]
            visited.update(fresh)
            pending += fresh


def producers(values: Iterable[ir.Value]) -> dict[ir.Node, None]:
    """Return the nodes that compute the values, each once, as an ordered set."""
    return dict.fromkeys(node for value in values if (node := value.producer()) is not None)


def chain(
    value: ir.Value, source: Callable[[ir.Node], ir.Value | None], *, stop: Callable[[ir.Value], bool] | None = None
) -> Iterator[ir.Value]:
    """Yield a value, then the input it is a view of, and so on towards the producer.

    Args:
        value: Where to start.
        source: Returns the input of a node at which to go on, or None to end there.
        stop: The chain ends at a value for which this is true.
    """
    current: ir.Value | None = value
    while current is not None:
        yield current
        node = current.producer()
        current = None if node is None or (stop is not None and stop(current)) else source(node)


def through(value: ir.Value, operators: Collection[str] | Callable[[ir.Node], bool]) -> ir.Value:
    """Return the value before any of these operators: skip them along their first input, towards the producer.

    Args:
        value: The value.
        operators: Names of operators to skip, such as `{"Identity", "Cast"}`, or a predicate on nodes.
    """
    skips = operators if callable(operators) else lambda node: node.op_type in operators
    *_, last = chain(value, lambda node: node.inputs[0] if node.inputs and skips(node) else None)
    return last


def is_fed(value: ir.Value) -> bool:
    """Return whether a value is an input that the caller must feed: a graph input without a default."""
    return value.is_graph_input() and not value.is_initializer()


def uses_of(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return the nodes that read a value, with the index of the input; nodes that were removed do not count."""
    return [(use.node, use.idx) for use in value.uses() if use.node.graph is not None]


def find_live(graph: ir.Graph) -> set[ir.Node | ir.Value]:
    """Return the nodes, initializers and inputs that the outputs of a graph depend on; all else is dead code."""
    live: set[ir.Node | ir.Value] = set()
    for value in upstream(graph.outputs):
        live.add(value.producer() or value)
    return live
