"""Roll up recurrences that are written out token by token: N equal bodies become one `Scan`.

An exporter that traces a loop over tokens writes its body once for each token. Body i reads element i of tensors along
their sequence axes, and what body i - 1 computed; its result becomes row i of a tensor. If every body computes the same
of these, one `Scan` computes that tensor, and the number of tokens is no part of the graph any more.

    before: row[i] = f(x[i], state[i]), state[i + 1] = g(x[i], state[i]) for i = 0 .. N - 1; y = Concat(row[0], ...)
    after:  y = Scan(start, x; body: f and g of the first token)

The result is the same for any graph. A body with another weight, another order or an element of another token is no
repetition of the first one, and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from kvsurgeon.dataflow.shape_inference import Shapes
from kvsurgeon.graph.constants import small_constant
from kvsurgeon.graph.query import is_operator, producer_of, upstream
from kvsurgeon.graph.value_numbering import NONDETERMINISTIC, ValueNumbering, constant_key, operator_key
from kvsurgeon.ops.content import content_inputs, depends_on_input
from kvsurgeon.ops.operator import Trait
from kvsurgeon.ops.table import has_trait

PATTERN = 1  # number of the body that others are compared with
_LEAST = 4  # bodies: fewer are no loop over tokens


@dataclass(frozen=True, kw_only=True)
class JoinedRows:
    """A tensor that is made of one row for each token.

    Attributes:
        result: The tensor.
        axis: Its sequence axis.
        shape: Its sizes.
        rows: The values that hold its rows, in order.
    """

    result: ir.Value
    axis: int
    shape: tuple[int, ...]
    rows: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Element:
    """One element along an axis of a tensor: its only place is in the body of one token."""

    source: ir.Value
    axis: int
    index: int


@dataclass(kw_only=True)
class Loop:
    """A loop over tokens that is written out: the body of its second token, and what each body passes to the next.

    Attributes:
        rows: The tensor that it computes.
        elements: Values of the body that are an element of a tensor, with that.
        places: Inputs of nodes of the body that read a state, with its number.
        starts: Value of each state before the first token.
        results: Value of each state after the body, by its number.
        constants: Values that are the same in every body.
    """

    rows: JoinedRows
    elements: dict[ir.Value, Element] = field(default_factory=dict)
    places: dict[tuple[ir.Node, int], int] = field(default_factory=dict)
    starts: list[ir.Value] = field(default_factory=list)
    results: dict[int, ir.Value] = field(default_factory=dict)
    constants: dict[ir.Value, None] = field(default_factory=dict)


def may_be_unrolled(graph: ir.Graph) -> bool:
    """Return whether a graph has nodes that join as many rows as a loop over tokens."""
    return any(_joins_rows(node) for node in graph)


def find_loop(shapes: Shapes, node: ir.Node) -> Loop | None:
    """Return the loop that computes the rows that a node joins; None if they are not those of a recurrence."""
    rows = _rows_of(shapes, node) if _joins_rows(node) else None
    if rows is None:
        return None
    bodies, loop = _Bodies(shapes, rows), None
    numbered = ((number, row) for number, row in enumerate(rows.rows) if number != PATTERN)
    if all(bodies.repeats(rows.rows[PATTERN], row, number) for number, row in numbered):
        loop = bodies.loop
    is_whole = loop is not None and loop.starts and len(loop.results) == len(loop.starts)
    return loop if loop is not None and is_whole and _fits(shapes, loop) else None


def _fits(shapes: Shapes, loop: Loop) -> bool:
    """Return whether bodies read all elements of their tensors, and all states can be in one tensor of known sizes."""
    count = len(loop.rows.rows)
    if any((shapes[one.source].shape or ())[one.axis] != count for one in loop.elements.values()):
        return False
    before = [(shapes[value].shape, shapes[value].dtype) for value in loop.starts]
    after = [(shapes[value].shape, shapes[value].dtype) for _, value in sorted(loop.results.items())]
    types = {dtype for _, dtype in before}
    is_one = len(types) == 1 or all(dtype is not None and dtype.is_floating_point() for dtype in types)
    if before != after or len({shape for shape, _ in before}) > 1 or not is_one:
        return False
    sizes = [shapes[value].shape for value in (loop.starts[0], *loop.elements)]
    return all(shape is not None and all(map(_is_known, shape)) for shape in sizes)


def _is_known(size: object) -> bool:
    return isinstance(size, int)


class _Bodies:
    """Compares the body of each token with that of the second one.

    The second body is the pattern: an optimizer may have merged states in the first one, where they are all zeros.
    """

    def __init__(self, shapes: Shapes, rows: JoinedRows) -> None:
        self.shapes, self.loop = shapes, Loop(rows=rows)
        self._numbering = ValueNumbering(self._leaf)
        self._repeated: list[dict[ir.Value, ir.Value]] = [{} for _ in rows.rows]  # by value of the pattern
        self._states: list[dict[int, ir.Value]] = [{} for _ in rows.rows]  # before the token, by number
        self._free: dict[ir.Value, bool] = {}

    def _leaf(self, value: ir.Value) -> Hashable | None:
        fact = self.shapes.facts.get(value)
        if fact is not None and fact.value is not None:
            return str(fact.dtype), fact.value.shape, tuple(fact.value.reshape(-1))
        return constant_key(value)

    def repeats(self, pattern: ir.Value, value: ir.Value, body: int) -> bool:
        """Return whether a value is in its body what another one is in the pattern."""
        known = self._repeated[body].get(pattern)
        if known is not None or body == PATTERN:
            return (pattern if body == PATTERN else known) is value
        if pattern is value:
            return False  # of all tokens, or of another one
        if not self._is_element(pattern, value, body) and not self._is_computed(pattern, value, body):
            return False
        self._repeated[body][pattern] = value
        return True

    def _is_element(self, pattern: ir.Value, value: ir.Value, body: int) -> bool:
        """Return whether two values are the elements of their tokens, of the same tensor."""
        one, other = element_of(self.shapes, pattern), element_of(self.shapes, value)
        if one is None or one.index != PATTERN or other != Element(one.source, one.axis, body):
            return False
        self.loop.elements[pattern] = one
        return self.shapes[pattern].shape == self.shapes[value].shape

    def _is_computed(self, pattern: ir.Value, value: ir.Value, body: int) -> bool:
        """Return whether two nodes are equal, and so are their inputs."""
        one, other = pattern.producer(), value.producer()
        if one is None or other is None or pattern.index() != value.index() or len(one.inputs) != len(other.inputs):
            return False
        if operator_key(one) != operator_key(other) or one.op_type.startswith(NONDETERMINISTIC):
            return False
        if any(attribute.type is ir.AttributeType.GRAPH for attribute in one.attributes.values()):
            return False
        return all(self._reads_same(one, index, source, body) for index, source in enumerate(other.inputs))

    def _reads_same(self, node: ir.Node, index: int, value: ir.Value | None, body: int) -> bool:
        """Return whether a node of the pattern reads what the same node of another body reads."""
        pattern = node.inputs[index]
        if pattern is None or value is None:
            return pattern is value
        if (node, index) in self.loop.places:
            return self._is_state(self.loop.places[node, index], value, body)
        if self._is_free(pattern):
            self.loop.constants[pattern] = None
            return self._numbering[pattern] == self._numbering[value]
        if body or not self._is_free(value):
            return self.repeats(pattern, value, body)
        self._add_state((node, index), start=value, after=pattern)
        return True

    def _add_state(self, place: tuple[ir.Node, int], start: ir.Value, after: ir.Value) -> None:
        """Add a state, if there is none yet that has these values before and after the first token."""
        firsts = self._states[PATTERN]
        known = (number for number, one in enumerate(self.loop.starts) if one is start and firsts[number] is after)
        number = next(known, len(self.loop.starts))
        if number == len(self.loop.starts):
            self.loop.starts.append(start)
            firsts[number] = after
        self.loop.places[place] = number

    def _is_state(self, number: int, value: ir.Value, body: int) -> bool:
        """Return whether a value is what the body before computed as a state."""
        if body == 0:
            return value is self.loop.starts[number]
        known = self._states[body].setdefault(number, value)
        if known is not value:
            return False
        if number in self.loop.results:
            return self.repeats(self.loop.results[number], value, body - 1)
        self.loop.results[number] = value
        return body == PATTERN + 1 and self.repeats(value, self._states[PATTERN][number], 0)

    def _is_free(self, value: ir.Value) -> bool:
        """Return whether a value is the same for all texts: computed from constants and sizes, which are fixed."""
        if value not in self._free:
            walked = upstream([value], stop=lambda one: self._free.get(one) is True, inputs=content_inputs)
            self._free[value] = not any(one.is_graph_input() or self._free.get(one) is False for one in walked)
        return self._free[value]


def element_of(shapes: Shapes, value: ir.Value) -> Element | None:
    """Return which element of which tensor a value is."""
    node = producer_of(value, "Gather", "Slice", "Split")
    source = None if node is None else node.inputs[0]
    shape = None if source is None else shapes[source].shape
    if node is None or source is None or shape is None:
        return None
    if node.op_type == "Gather":
        return _gathered(shapes, node, source, len(shape))
    return _sliced(node, source) if node.op_type == "Slice" else _part(shapes, node, source, value)


def _gathered(shapes: Shapes, node: ir.Node, source: ir.Value, rank: int) -> Element | None:
    index = shapes[node.inputs[1]].value if node.inputs[1] is not None else None
    axis = node.attributes.get_int("axis", 0)
    if index is None or index.size != 1 or not isinstance(index.item(), int) or index.item() < 0:
        return None
    return Element(source, axis + rank if axis < 0 else axis, index.item())


def _sliced(node: ir.Node, source: ir.Value) -> Element | None:
    bounds = [small_constant(value) for value in node.inputs[1:]]
    if len(bounds) < 3 or any(bound is None or bound.size != 1 for bound in bounds):
        return None
    start, end, axis, *step = (int(bound.item()) for bound in bounds if bound is not None)
    return Element(source, axis, start) if axis >= 0 and 0 <= start == end - 1 and step in ([], [1]) else None


def _part(shapes: Shapes, node: ir.Node, source: ir.Value, value: ir.Value) -> Element | None:
    axis = node.attributes.get_int("axis", 0)
    sizes = {(shapes[output].shape or (0,))[axis] for output in node.outputs}
    return Element(source, axis, value.index() or 0) if axis >= 0 and sizes == {1} else None


def _joins_rows(node: ir.Node) -> bool:
    """Return whether a node joins rows, or adds the last one to others that were added before."""
    if is_operator(node, "Concat"):
        is_computed = len(node.inputs) >= _LEAST and not any(map(_is_constant, node.inputs))
        return is_computed and depends_on_input(node.outputs[0])  # unlike a shape
    return has_trait(node, Trait.SCATTER) and not _is_added_to(node) and len(list(_writes(node))) >= _LEAST


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and (value.is_initializer() or producer_of(value, "Constant") is not None)


def _is_added_to(node: ir.Node) -> bool:
    return any(has_trait(user, Trait.SCATTER) and index == 0 for user, index in node.outputs[0].uses())


def _writes(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes that write into a tensor, from the last one."""
    current: ir.Node | None = node
    while current is not None and has_trait(current, Trait.SCATTER):
        yield current
        current = None if current.inputs[0] is None else current.inputs[0].producer()


def _rows_of(shapes: Shapes, node: ir.Node) -> JoinedRows | None:
    """Return the rows of which the result of a node is made; None if it is not made of single rows of known sizes."""
    result = node.outputs[0]
    shape = shapes[result].shape
    if shape is None or not all(map(_is_known, shape)):
        return None
    sizes = tuple(size for size in shape if isinstance(size, int))
    if is_operator(node, "Concat"):
        axis = node.attributes["axis"].as_int() % len(sizes)
        rows = tuple(value for value in node.inputs if value is not None)
        is_single = all((shapes[row].shape or (0,) * len(sizes))[axis] == 1 for row in rows)
        return JoinedRows(result=result, axis=axis, shape=sizes, rows=rows) if is_single else None
    writes = list(_writes(node))[::-1]
    places = [_written(shapes, one, sizes) for one in writes]
    axis = places[0][0] if places[0] is not None else 0
    if places != [(axis, index) for index in range(sizes[axis])]:
        return None
    rows = tuple(value for one in writes if (value := one.inputs[2]) is not None)
    return JoinedRows(result=result, axis=axis, shape=sizes, rows=rows)


def _written(shapes: Shapes, node: ir.Node, sizes: Sequence[int]) -> tuple[int, int] | None:
    """Return the axis and the index of the one row that a node writes."""
    fact = shapes[node.inputs[1]] if node.inputs[1] is not None else None
    if fact is None or fact.value is None or node.attributes.get_string("reduction", "none") != "none":
        return None
    try:
        indices = fact.value.astype(np.int64)
    except TypeError:  # symbolic
        return None
    if not indices.size:
        return None
    if node.op_type == "ScatterElements":
        axis = node.attributes.get_int("axis", 0) % len(sizes)
        whole = indices.shape == (*sizes[:axis], 1, *sizes[axis + 1 :])
        return (axis, int(indices.flat[0])) if whole and (indices == indices.flat[0]).all() else None
    if node.op_type != "ScatterND":
        return None
    axis = indices.shape[-1] - 1
    flat = indices.reshape(-1, axis + 1)
    grid = np.stack(np.meshgrid(*map(np.arange, sizes[:axis]), flat[0, -1], indexing="ij"), -1).reshape(-1, axis + 1)
    return (axis, int(flat[0, -1])) if np.array_equal(flat, grid) else None
